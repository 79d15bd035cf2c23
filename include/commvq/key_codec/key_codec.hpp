#pragma once

#include <cstdint>
#include <vector>

#include "commvq/key_codec/encoder.hpp"

namespace commvq {

/// Keys of one layer: a codebook per KV head and one norm per token over all of them
/// (CommVQ, section 3.3). Keys are coded before RoPE. Immutable after construction.
class KeyCodec {
 public:
  /// One codebook a head; all must have the same configuration. Throws `Error` if none is given,
  /// if they differ, or if a row holds NaN or infinity.
  explicit KeyCodec(std::vector<KeyCodebook<float>> codebooks);

  const KeyCodecConfig& config() const { return heads_.front().codebook().config; }
  int num_kv_heads() const { return static_cast<int>(heads_.size()); }
  const KeyCodebook<float>& codebook(int head) const { return encoder(head).codebook(); }
  const KeyEncoder<float>& encoder(int head) const { return heads_[static_cast<std::size_t>(head)]; }

  /// Bits of one token: codes of every head and the bf16 norm.
  Index bits_per_token() const { return Index{config().bits_per_head()} * num_kv_heads() + 16; }

  /// Encodes `keys` `[tokens][num_kv_heads * head_dim]`, channel order, before RoPE, with the
  /// configuration's beam width. `codes` is `[tokens][num_kv_heads * num_codes()]`, `norms`
  /// `[tokens]` bf16 bits: the L2 norm of the row, by whose rounded value the row is divided.
  /// A zero key gets norm 0 and decodes to zeros. Throws `Error` for shapes that do not fit, and
  /// for NaN, infinity or a norm beyond bf16's range, naming token and channel.
  void encode(MatrixView<const float> keys, MatrixView<std::uint16_t> codes,
              std::uint16_t* norms) const;

  /// Decodes to `keys` `[tokens][num_kv_heads * head_dim]`, channel order, before RoPE. Throws
  /// `Error` for shapes that do not fit and for a code that is not below codebook_size.
  void decode(MatrixView<const std::uint16_t> codes, const std::uint16_t* norms,
              MatrixView<float> keys) const;

 private:
  std::vector<KeyEncoder<float>> heads_;
};

}  // namespace commvq
