#pragma once

#include <vector>

#include "commvq/cuda/integer_codebook.hpp"

namespace commvq::cuda {

/// How rows of 4 bits of some stages become integers.
///
/// Sums take one row of four stages at a time, a line of a group each. A split stage's second
/// numbers are in the last group's line of the same place, which the stages leave free if they are
/// no multiple of four.
struct NarrowWeights {
  std::vector<IntegerKeySlice::Stage> stages;

  /// For stages whose entries have these ranges, `[stage][pair]`: those with about the least error
  /// of rounding, relative to each pair's largest range, for which sums stay below 2048 and all
  /// groups but the first two have the same weight.
  explicit NarrowWeights(const std::vector<std::vector<double>>& ranges);

 private:
  /// With weights about `scale` times the stages' relative sizes.
  NarrowWeights(const std::vector<double>& sizes, double scale);
  int sum() const;
};

}  // namespace commvq::cuda
