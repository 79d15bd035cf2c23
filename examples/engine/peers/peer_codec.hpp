#pragma once

#include <cstdint>
#include <vector>

#include "commvq/core/view.hpp"

namespace engine {

using commvq::Index;
using commvq::MatrixView;

/// What a peer keeps of a block of tokens: codes of `PeerCodec::code_bits()` bits each, and numbers
/// in FP16. They are not packed, but nothing else may be used to decode the block.
struct PeerCodes {
  std::vector<std::uint16_t> codes;
  std::vector<std::uint16_t> halves;
};

/// A codec of another method, for the keys or the values of one layer, to compare quality with.
/// Rows are tokens, `[num_kv_heads * head_dim]`, channel order. Immutable; any number of threads
/// may call at once.
class PeerCodec {
 public:
  virtual ~PeerCodec() = default;

  /// Bits of each code.
  virtual int code_bits() const = 0;
  /// Tokens that are coded together.
  virtual Index block_tokens() const { return 1; }
  /// Codes `rows`, a multiple of `block_tokens()` of them.
  virtual PeerCodes encode(MatrixView<const float> rows) const = 0;
  /// The inverse, to as many rows.
  virtual void decode(const PeerCodes& codes, MatrixView<float> rows) const = 0;
};

/// Bits that a token of `num_channels` channels takes, counted from what `encode` keeps of a block:
/// codes, norms, scales and zeros.
double bits_per_token(const PeerCodec& codec, Index num_channels);

}  // namespace engine
