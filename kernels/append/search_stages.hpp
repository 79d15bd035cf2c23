#pragma once

#include <cstdint>
#include <vector>

#include "commvq/key_codec/codebook.hpp"

namespace commvq::cuda {

/// The stages of the searches by warpgroups (see `SearchStage`), [heads][groups][stages], of books
/// of 64 centroids over 64 pairs. `scale` is that of the operands; rows have the weights of the
/// errors.
std::vector<std::uint8_t> search_stages(const std::vector<KeyCodebook<float>>& codebooks, bool tied,
                                        double scale);

}  // namespace commvq::cuda
