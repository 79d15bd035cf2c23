#pragma once

#include <cstdint>
#include <vector>

#include "commvq/key_codec/codebook.hpp"

#include "encoder_view.hpp"

namespace commvq::cuda {

/// What the search for any key codes reads (see `KeyEncoderView`), of all heads, groups and stages.
struct KeySearchTables {
  std::vector<float> rows, squared_norms, cross_terms, cross_terms_by_b, cross_units;
  std::vector<std::uint32_t> operands, rounded_cross_terms;

  /// Of codebooks whose rows have the weights of the errors; `keys` has their shape, `row_scale` is
  /// that of operands.
  KeySearchTables(const std::vector<KeyCodebook<float>>& codebooks, const KeyEncoderView& keys,
                  double row_scale);

 private:
  void add_stage(const float* books, const KeyEncoderView& keys, double row_scale);
};

}  // namespace commvq::cuda
