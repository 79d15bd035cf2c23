#include "narrow_weights.hpp"

#include <algorithm>
#include <cmath>

#include "core/divide_up.hpp"

namespace commvq::cuda {
namespace {

/// Sums of fp16 numbers' place that they count exactly.
constexpr int kLargestSum = 2047;

/// Weights that are tried, of the largest stage.
constexpr double kScales[] = {1, 1.25, 1.5, 2, 2.5, 3,  3.5, 4,  4.5, 5,
                              6, 7,    8,   9, 10,  12, 14,  16, 20,  24};

int rounded_weight(double weight) {
  return std::max(1, static_cast<int>(std::lround(weight)));
}

/// Mean over the pairs of the stages' ranges relative to the pair's largest one.
std::vector<double> relative_sizes(const std::vector<std::vector<double>>& ranges) {
  std::vector<double> sizes(ranges.size());
  const std::size_t pairs = ranges.empty() ? 0 : ranges.front().size();
  for (std::size_t pair = 0; pair < pairs; ++pair) {
    double largest = 0;
    for (const auto& stage : ranges) largest = std::max(largest, stage[pair]);
    if (largest == 0) continue;
    for (std::size_t s = 0; s < ranges.size(); ++s)
      sizes[s] += ranges[s][pair] / largest / double(pairs);
  }
  return sizes;
}

/// Sum over pairs of the squared errors of rounding, relative to the largest ranges.
double error_of(const NarrowWeights& weights, const std::vector<std::vector<double>>& ranges) {
  double steps = 0, error = 0;
  for (const auto& stage : weights.stages) steps += stage.step() * stage.step();
  for (std::size_t pair = 0; pair < ranges.front().size(); ++pair) {
    double largest = 0, unit = 0;
    for (std::size_t s = 0; s < ranges.size(); ++s) {
      largest = std::max(largest, ranges[s][pair]);
      unit = std::max(unit, ranges[s][pair] / weights.stages[s].largest());
    }
    if (largest > 0) error += steps * unit * unit / (largest * largest);
  }
  return error;
}

}  // namespace

NarrowWeights::NarrowWeights(const std::vector<double>& sizes, double scale) {
  const int num = static_cast<int>(sizes.size());
  const int groups = divide_up(num, 4), free = 4 * groups - num;
  // Of the largest of some stages.
  const auto common_weight = [&](int begin, int end) {
    double largest = 0;
    for (int s = begin; s < end; ++s)
      largest = std::max(largest, sizes[static_cast<std::size_t>(s)]);
    return rounded_weight(scale * largest);
  };
  const int rest = common_weight(8, num);  // behind the second group
  const int second = groups > 2 ? rest : common_weight(free, num);
  for (int s = 0; s < num; ++s) {
    const double wanted = scale * sizes[static_cast<std::size_t>(s)];
    const bool in_last = s >= 4 * (groups - 1);
    IntegerKeySlice::Stage stage{in_last ? s + free : s, -1, s < 8 ? rounded_weight(wanted) : rest,
                                 0};
    if (groups > 1 && s < free) {
      // A multiple of the other lines' weights, and no more than sixteen of them: no gaps.
      stage.second = second;
      stage.second_line = 4 * (groups - 1) + s;
      const double times = std::ceil(wanted / second - 1);
      stage.first = second * static_cast<int>(std::clamp(times, 1.0, 16.0));
    }
    stages.push_back(stage);
  }
}

NarrowWeights::NarrowWeights(const std::vector<std::vector<double>>& ranges) {
  const std::vector<double> sizes = relative_sizes(ranges);
  double least = INFINITY;
  for (const double scale : kScales) {
    const NarrowWeights tried(sizes, scale);
    if (tried.sum() > kLargestSum) continue;
    const double error = error_of(tried, ranges);
    if (error >= least) continue;
    least = error;
    stages = tried.stages;
  }
}

int NarrowWeights::sum() const {
  int sum = 0;
  for (const IntegerKeySlice::Stage& stage : stages) sum += 2 * stage.largest();  // two books
  return sum;
}

}  // namespace commvq::cuda
