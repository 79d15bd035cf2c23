#include "greedy_image.hpp"

#include <cmath>
#include <cstring>

#include "greedy_stage.hpp"
#include "operands.hpp"

namespace commvq::cuda {
namespace {

/// Both books of a stage, [128][128].
struct Books {
  const float* rows;

  double dot(int n, int m) const {
    double sum = 0;
    for (int i = 0; i < GreedyStage::kWidth; ++i)
      sum += double{rows[n * GreedyStage::kWidth + i]} * rows[m * GreedyStage::kWidth + i];
    return sum;
  }
};

template <class T>
void put(std::uint8_t* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

void write_stage(const Books& books, double scale, std::uint8_t* stage) {
  constexpr int kSize = GreedyStage::kSize;
  for (int n = 0; n < kSize; ++n) {
    for (int i = 0; i < GreedyStage::kWidth; ++i) {
      const Halves halves(double{books.rows[n * GreedyStage::kWidth + i]} * scale);
      std::uint8_t* const at = stage + GreedyStage::operand(n, i);
      put(at, halves.hi);
      put(at + GreedyStage::kPartBytes, halves.lo);
    }
    put(stage + GreedyStage::kNorms + 4 * n, static_cast<float>(books.dot(n, n)));
  }
  std::vector<double> cross;
  for (int a = 0; a < kSize; ++a)
    for (int b = 0; b < kSize; ++b) cross.push_back(2 * books.dot(a, kSize + b));
  const double unit = largest_of(cross) / kLargestCrossTerm;
  put(stage + GreedyStage::kUnit, static_cast<float>(unit));
  for (int a = 0; a < kSize; ++a)
    for (int b = 0; b < kSize; ++b) {
      const double term = cross[static_cast<std::size_t>(a * kSize + b)];
      put(stage + GreedyStage::kCrossTerms + GreedyStage::cross_term(a, b),
          static_cast<std::int16_t>(unit > 0 ? std::nearbyint(term / unit) : 0.0));
    }
}

}  // namespace

std::vector<std::uint8_t> greedy_stages(const std::vector<KeyCodebook<float>>& codebooks,
                                        double scale) {
  const KeyCodecConfig& config = codebooks[0].config;
  const auto stages =
      static_cast<std::size_t>(config.num_groups()) * static_cast<std::size_t>(config.num_stages);
  std::vector<std::uint8_t> image(codebooks.size() * stages * GreedyStage::kBytes);
  std::uint8_t* at = image.data();
  for (const KeyCodebook<float>& codebook : codebooks)
    for (int group = 0; group < config.num_groups(); ++group)
      for (int stage = 0; stage < config.num_stages; ++stage, at += GreedyStage::kBytes)
        write_stage({codebook.book(group, stage, 0)}, scale, at);
  return image;
}

}  // namespace commvq::cuda
