// Weights of key rows in 4 bits.
#include "cuda/narrow_weights.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <random>
#include <vector>

#include <gtest/gtest.h>

namespace commvq::cuda {
namespace {

using Ranges = std::vector<std::vector<double>>;

/// Of stages that shrink by `shrinking`, in pairs of different sizes.
Ranges ranges_of(int stages, double shrinking, unsigned seed) {
  std::mt19937 rng(seed);
  std::uniform_real_distribution<double> spread(0.7, 1.3);
  std::vector<double> sizes(64);
  for (double& size : sizes) size = std::exp(3 * spread(rng));
  Ranges ranges;
  for (int s = 0; s < stages; ++s) {
    auto& stage = ranges.emplace_back();
    for (const double size : sizes) stage.push_back(size * std::pow(shrinking, s) * spread(rng));
  }
  return ranges;
}

/// Sum over stages and pairs of the squared error of rounding with these weights, twice a book.
double error_of(const NarrowWeights& weights, const Ranges& ranges) {
  double error = 0;
  for (std::size_t pair = 0; pair < ranges[0].size(); ++pair) {
    double unit = 0;
    for (std::size_t s = 0; s < ranges.size(); ++s)
      unit = std::max(unit, ranges[s][pair] / weights.stages[s].largest());
    for (const auto& stage : weights.stages) error += std::pow(stage.step() * unit, 2);
  }
  return error;
}

class NarrowWeightsOfStages : public testing::TestWithParam<int> {};

TEST_P(NarrowWeightsOfStages, KeepToTheKernelsBounds) {
  const int stages = GetParam(), groups = (stages + 3) / 4;
  for (const double shrinking : {0.5, 0.8, 0.97, 1.0}) {
    const NarrowWeights weights(ranges_of(stages, shrinking, 1));
    ASSERT_EQ(weights.stages.size(), static_cast<std::size_t>(stages));
    std::vector<int> lines(static_cast<std::size_t>(4 * groups)), used(lines.size());
    int sum = 0;
    for (const auto& stage : weights.stages) {
      sum += 2 * stage.largest();
      ++used[static_cast<std::size_t>(stage.line)];
      lines[static_cast<std::size_t>(stage.line)] = stage.first;
      EXPECT_GE(stage.first, 1);
      if (stage.second == 0) continue;
      // The same place of another group, whose lane has the codes; numbers without gaps.
      ++used[static_cast<std::size_t>(stage.second_line)];
      lines[static_cast<std::size_t>(stage.second_line)] = stage.second;
      EXPECT_EQ(stage.second_line % 4, stage.line % 4);
      EXPECT_EQ(stage.first % stage.second, 0);
      EXPECT_LE(stage.first, 16 * stage.second);
    }
    EXPECT_LE(sum, 2047);
    for (std::size_t line = 0; line < lines.size(); ++line) {
      EXPECT_EQ(used[line], groups > 1 || lines[line] > 0 ? 1 : 0) << line;
      EXPECT_EQ(lines[line], lines[std::min(line, std::size_t{8})]) << line;
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Numbers, NarrowWeightsOfStages, testing::Range(1, 23));

/// The weights are worth their trouble: equal ones would err more.
TEST(NarrowWeights, ErrLessThanEqualOnes) {
  for (const int stages : {8, 11, 20, 21})
    for (const double shrinking : {0.7, 0.8, 0.9}) {
      const Ranges ranges = ranges_of(stages, shrinking, 2);
      const NarrowWeights weights(ranges);
      NarrowWeights equal = weights;
      for (auto& stage : equal.stages) stage.first = 1, stage.second = 0;
      EXPECT_LT(error_of(weights, ranges), 0.9 * error_of(equal, ranges))
          << stages << " stages, " << shrinking;
    }
}

TEST(NarrowWeights, TakeStagesWithoutEntries) {
  Ranges ranges = ranges_of(11, 0.8, 3);
  for (double& range : ranges[4]) range = 0;
  for (auto& stage : ranges) stage[5] = 0;
  EXPECT_EQ(NarrowWeights(ranges).stages.size(), 11U);
}

}  // namespace
}  // namespace commvq::cuda
