#pragma once

#include <vector>

#include "engine/peers/kmeans.hpp"
#include "engine/peers/peer_codec.hpp"

namespace engine {

/// How a vector quantiser cuts a token's channels, and how often it codes each part.
struct VectorQuantizerShape {
  int width = 8;   ///< channels of a sub-vector
  int stages = 1;  ///< codes of a sub-vector, each of what the ones before leave

  /// Product quantisation (Jegou et al. 2011): short sub-vectors, one code each. 8 / width bits a
  /// number.
  static VectorQuantizerShape product(int bits) { return {8 / bits, 1}; }
  /// Residual quantisation (Chen et al. 2010): one sub-vector a head, 8 stages / head_dim bits a
  /// number.
  static VectorQuantizerShape residual(int bits, int head_dim) {
    return {head_dim, bits * head_dim / 8};
  }
};

struct VectorQuantizerOptions {
  VectorQuantizerShape shape;
  int iterations = 15;     ///< of k-means
  int max_tokens = 16384;  ///< learn from at most so many tokens, evenly spread
  std::uint64_t seed = 1;
};

/// Codes of 8 bits, and nothing else: every sub-vector becomes the sum of one of 256 rows of each
/// of its stages' codebooks, chosen stage by stage.
class VectorQuantizer final : public PeerCodec {
 public:
  static constexpr int kCodebookSize = 256;

  /// Learns the codebooks by k-means, stage by stage, from `rows` `[tokens][num_channels]`. Throws
  /// `commvq::Error` for no rows and unless the width divides the number of channels.
  VectorQuantizer(MatrixView<const float> rows, const VectorQuantizerOptions& options);

  int code_bits() const override { return 8; }
  PeerCodes encode(MatrixView<const float> rows) const override;
  void decode(const PeerCodes& codes, MatrixView<float> rows) const override;

 private:
  Index num_parts() const { return static_cast<Index>(codebooks_.size()) / shape_.stages; }
  const Points& codebook(Index part, int stage) const {
    return codebooks_[static_cast<std::size_t>(part * shape_.stages + stage)];
  }

  VectorQuantizerShape shape_;
  std::vector<Points> codebooks_;  // [parts][stages], each [kCodebookSize][width]
};

}  // namespace engine
