#pragma once

#include <cstdint>
#include <vector>

#include "commvq/key_codec/codebook.hpp"

#include "encoder_view.hpp"

namespace commvq::cuda {

/// What the search for binary key codes reads (see `BinarySearchView`), of all heads.
struct BinarySearchTables {
  double direction_scale = 1, gram_scale = 1;
  std::vector<std::uint32_t> directions, grams;
  std::vector<float> offsets;
  std::vector<BinaryStep> steps;

  /// Of codebooks whose rows have the weights of the errors.
  explicit BinarySearchTables(const std::vector<KeyCodebook<float>>& codebooks);
};

}  // namespace commvq::cuda
