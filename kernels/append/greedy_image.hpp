#pragma once

#include <cstdint>
#include <vector>

#include "commvq/key_codec/codebook.hpp"

namespace commvq::cuda {

/// The stages of the greedy search by warpgroups (see `GreedyStage`), [heads][groups][stages], of
/// tied books of 64 centroids over 64 pairs. `scale` is that of the operands; rows have the weights
/// of the errors.
std::vector<std::uint8_t> greedy_stages(const std::vector<KeyCodebook<float>>& codebooks,
                                        double scale);

}  // namespace commvq::cuda
