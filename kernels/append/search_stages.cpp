#include "search_stages.hpp"

#include <cmath>
#include <cstring>

#include "operands.hpp"
#include "search_stage.hpp"

namespace commvq::cuda {
namespace {

/// Both books of a stage, [128][128].
struct Books {
  const float* rows;

  double dot(int n, int m) const {
    constexpr int kWidth = SearchStage<true>::kWidth;
    double sum = 0;
    for (int i = 0; i < kWidth; ++i) sum += double{rows[n * kWidth + i]} * rows[m * kWidth + i];
    return sum;
  }
};

template <class T>
void put(std::uint8_t* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

/// Returns the cross terms.
template <bool kTied>
std::vector<double> write_stage(const Books& books, double scale, std::uint8_t* to) {
  using Stage = SearchStage<kTied>;
  constexpr int kSize = Stage::kSize, kWidth = Stage::kWidth;
  for (int n = 0; n < Stage::kNumBooks * kSize; ++n) {
    for (int i = 0; i < kWidth; ++i) {
      const Halves halves(double{books.rows[n * kWidth + i]} * scale);
      std::uint8_t* const at = to + n / kSize * Stage::kBookBytes + Stage::operand(n % kSize, i);
      put(at, halves.hi);
      put(at + Stage::kPartBytes, halves.lo);
    }
    put(to + Stage::kNorms + 4 * n, static_cast<float>(books.dot(n, n)));
  }
  std::vector<double> cross;
  for (int a = 0; a < kSize; ++a)
    for (int b = 0; b < kSize; ++b) cross.push_back(2 * books.dot(a, kSize + b));
  const double unit = largest_of(cross) / kLargestCrossTerm;
  put(to + Stage::kUnit, static_cast<float>(unit));
  for (int a = 0; a < kSize; ++a)
    for (int b = 0; b < kSize; ++b) {
      const double term = cross[static_cast<std::size_t>(a * kSize + b)];
      const auto rounded = static_cast<std::int16_t>(unit > 0 ? std::nearbyint(term / unit) : 0.0);
      put(to + Stage::kMinusByB + Stage::cross_term(b, a), static_cast<std::int16_t>(-rounded));
      put(to + Stage::kCrossTerms + Stage::cross_term(a, b), rounded);
    }
  return cross;
}

}  // namespace

SearchStages::SearchStages(const std::vector<KeyCodebook<float>>& codebooks, bool tied,
                           double scale) {
  const KeyCodecConfig& config = codebooks[0].config;
  const int bytes = tied ? SearchStage<true>::kBytes : SearchStage<false>::kBytes;
  const auto stages = static_cast<std::size_t>(config.num_groups() * config.num_stages);
  image.resize(codebooks.size() * stages * static_cast<std::size_t>(bytes));
  std::uint8_t* at = image.data();
  for (const KeyCodebook<float>& codebook : codebooks)
    for (int group = 0; group < config.num_groups(); ++group)
      for (int stage = 0; stage < config.num_stages; ++stage, at += bytes) {
        const Books books{codebook.book(group, stage, 0)};
        const std::vector<double> cross =
            tied ? write_stage<true>(books, scale, at) : write_stage<false>(books, scale, at);
        for (const double term : cross) cross_terms.push_back(static_cast<float>(term));
      }
}

}  // namespace commvq::cuda
