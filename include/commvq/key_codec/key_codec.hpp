#pragma once

#include <cstdint>
#include <vector>

#include "commvq/core/digest.hpp"
#include "commvq/core/export.h"
#include "commvq/key_codec/encoder.hpp"

namespace commvq {

/// Keys of one layer: a codebook per KV head, and one norm per token over all of them
/// (CommVQ, section 3.3) or, with `norm_per_head`, one per token and head. Keys are coded before
/// RoPE. Immutable after construction.
class COMMVQ_API KeyCodec {
 public:
  /// One codebook a head; all must have the same configuration, and weights or none. Throws `Error`
  /// if none is given, if they differ, or if a row holds NaN or infinity.
  explicit KeyCodec(std::vector<KeyCodebook<float>> codebooks);

  const KeyCodecConfig& config() const { return heads_.front().codebook().config; }
  int num_kv_heads() const { return static_cast<int>(heads_.size()); }
  bool is_weighted() const { return !codebook(0).pair_weights.empty(); }
  const KeyCodebook<float>& codebook(int head) const { return encoder(head).codebook(); }
  const KeyEncoder<float>& encoder(int head) const {
    return heads_[static_cast<std::size_t>(head)];
  }

  /// Of the configuration, all rows and weights: codecs with equal digests give equal codes.
  const Digest& digest() const { return digest_; }

  /// Norms of one token: 1, or num_kv_heads().
  int num_norms() const { return config().num_norms(num_kv_heads()); }
  /// Bits of one token: codes of every head and the bf16 norms.
  Index bits_per_token() const {
    return Index{config().bits_per_head()} * num_kv_heads() + Index{16} * num_norms();
  }

  /// Encodes `keys` `[tokens][num_kv_heads * head_dim]`, channel order, before RoPE, with the
  /// configuration's beam width. `codes` is `[tokens][num_kv_heads * num_codes()]`, `norms`
  /// `[tokens][num_norms()]` bf16 bits: the L2 norm of the row or of each of its heads, by whose
  /// rounded value the row or head is divided. What has norm 0 decodes to zeros. Throws `Error` for
  /// shapes that do not fit, and for NaN, infinity or a norm beyond bf16's range, naming token and
  /// channel.
  void encode(MatrixView<const float> keys, MatrixView<std::uint16_t> codes,
              std::uint16_t* norms) const;

  /// Decodes to `keys` `[tokens][num_kv_heads * head_dim]`, channel order, before RoPE. Throws
  /// `Error` for shapes that do not fit and for a code that is not below codebook_size.
  void decode(MatrixView<const std::uint16_t> codes, const std::uint16_t* norms,
              MatrixView<float> keys) const;

 private:
  /// Where the norm of a head lies in `[tokens][num_norms()]`.
  Index norm_index(Index token, int head) const {
    return token * num_norms() + (config().norm_per_head ? head : 0);
  }

  std::vector<KeyEncoder<float>> heads_;
  Digest digest_;
};

}  // namespace commvq
