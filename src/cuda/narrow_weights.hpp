#pragma once

#include <cstddef>
#include <vector>

namespace commvq::cuda {

/// How rows of 4 bits of some stages become integers: a stage's entries are `first` times a number
/// in [0, 15], or of split stages that and `second` times another one.
///
/// Sums take one row of four stages at a time, a line of a group each. A split stage's second
/// numbers are in the last group's line of the same place, which the stages leave free if they are
/// no multiple of four.
struct NarrowWeights {
  struct Stage {
    int line;         ///< of its rows, 4 group + place
    int second_line;  ///< of its second numbers; -1: it is not split
    int first;
    int second;  ///< 0 if it is not split

    /// The difference of neighbouring entries, and the largest one.
    int step() const { return second > 0 ? second : first; }
    int largest() const { return 15 * (first + second); }
  };
  std::vector<Stage> stages;

  /// For stages whose entries have these ranges, `[stage][pair]`: those with about the least error
  /// of rounding, relative to each pair's largest range, for which sums stay below 2048 and all
  /// groups but the first two have the same weight.
  explicit NarrowWeights(const std::vector<std::vector<double>>& ranges);

  /// The weights of the lines, `[groups][4]`.
  std::vector<int> of_lines() const;

 private:
  /// With weights about `scale` times the stages' relative sizes.
  NarrowWeights(const std::vector<double>& sizes, double scale);
  int sum() const;
};

}  // namespace commvq::cuda
