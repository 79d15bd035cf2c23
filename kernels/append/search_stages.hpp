#pragma once

#include <cstdint>
#include <vector>

#include "commvq/key_codec/codebook.hpp"

namespace commvq::cuda {

/// What the searches by warpgroups read of books of 64 centroids over 64 pairs.
struct SearchStages {
  std::vector<std::uint8_t> image;  ///< SearchStage [heads][groups][stages]
  std::vector<float> cross_terms;   ///< [heads][groups][stages][a][b], as in `KeyEncoderView`

  /// `scale` is that of the operands; rows have the weights of the errors.
  SearchStages(const std::vector<KeyCodebook<float>>& codebooks, bool tied, double scale);
};

}  // namespace commvq::cuda
