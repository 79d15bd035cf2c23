#pragma once

#include "engine/peers/peer_codec.hpp"

namespace engine {

/// Asymmetric uniform quantisation as in KIVI (arXiv 2402.02750): groups of 32 numbers, an FP16
/// scale and an FP16 zero each, so b + 1 bits a number. KIVI groups keys along tokens, channel by
/// channel, and values along the channels of a token.
class KiviCodec final : public PeerCodec {
 public:
  enum class Groups { kAlongTokens, kAlongChannels };
  /// Numbers of a group.
  static constexpr Index kGroupSize = 32;

  /// Throws `commvq::Error` unless bits is in [1, 8] and, for groups along channels, num_channels a
  /// multiple of 32.
  KiviCodec(int bits, Groups groups, Index num_channels);

  int code_bits() const override { return bits_; }
  Index block_tokens() const override { return groups_ == Groups::kAlongTokens ? kGroupSize : 1; }
  PeerCodes encode(MatrixView<const float> rows) const override;
  void decode(const PeerCodes& codes, MatrixView<float> rows) const override;

 private:
  /// Calls `use(first, stride)` for the groups of a block, whose elements are numbers `first`,
  /// `first + stride`, ... of its rows laid end to end.
  template <class Use>
  void for_each_group(Index num_rows, Use use) const;

  int bits_;
  Groups groups_;
  Index num_channels_;
};

}  // namespace engine
