// How long the device takes to learn the codecs of a model of Llama-3.1-8B's shape (8 KV heads of
// 128, 65,536 tokens a layer), layer by layer, with the library's own 1-bit options. Made-up keys
// and values of about the statistics that models have: means of a few channels that are large
// beside the rest, a spectrum that falls off, outliers. What makes them up is not timed.
//
//     learner_cuda_bench [KEY_LAYERS [VALUE_LAYERS]]
//
// Prints a line a layer; the last line is JSON, in seconds.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "commvq/cuda/learner.hpp"

namespace {

using namespace commvq;

constexpr int kHeads = 8, kHeadDim = 128, kChannels = kHeads * kHeadDim, kRank = 48;
constexpr Index kTokens = 65536;

/// `[kTokens][kChannels]`: each head a mean, kRank directions of falling strength, and noise.
std::vector<float> made_up(std::uint64_t seed, double mean_size) {
  std::mt19937_64 shape(seed);
  std::normal_distribution<float> normal;
  std::vector<float> means(kChannels), directions(std::size_t{kRank} * kChannels);
  for (float& mean : means) {
    const float x = normal(shape);
    mean = static_cast<float>(mean_size) * x * std::abs(x);
  }
  for (int k = 0; k < kRank; ++k)
    for (int c = 0; c < kChannels; ++c)
      directions[static_cast<std::size_t>(k * kChannels + c)] =
          normal(shape) / std::sqrt(static_cast<float>(1 + k));
  std::vector<float> result(static_cast<std::size_t>(kTokens * kChannels));
#pragma omp parallel for
  for (Index t = 0; t < kTokens; ++t) {
    std::minstd_rand random(static_cast<std::uint32_t>(seed * 7919 + static_cast<std::uint64_t>(t)));
    std::normal_distribution<float> own;
    float* const row = result.data() + t * kChannels;
    for (int c = 0; c < kChannels; ++c) row[c] = means[static_cast<std::size_t>(c)] + 0.3f * own(random);
    for (int head = 0; head < kHeads; ++head)
      for (int k = 0; k < kRank; ++k) {
        const float strength = own(random);
        const float* const direction =
            directions.data() + std::size_t(k) * kChannels + head * kHeadDim;
        for (int i = 0; i < kHeadDim; ++i) row[head * kHeadDim + i] += strength * direction[i];
      }
  }
  return result;
}

template <class Learn>
double seconds_of(const char* what, int num_layers, double mean_size, Learn learn) {
  double total = 0;
  for (int layer = 0; layer < num_layers; ++layer) {
    const std::vector<float> data = made_up(static_cast<std::uint64_t>(layer) + 1, mean_size);
    const auto start = std::chrono::steady_clock::now();
    const double error = learn(as_matrix(data, kTokens, kChannels));
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("%s, layer %d: %.2f s, relative error %.4f\n", what, layer, seconds, error);
    std::fflush(stdout);
    total += seconds;
  }
  return total;
}

}  // namespace

int main(int argc, char** argv) {
  const int key_layers = argc > 1 ? std::atoi(argv[1]) : 32;
  const int value_layers = argc > 2 ? std::atoi(argv[2]) : 32;
  const double keys = seconds_of("keys", key_layers, 3.0, [](MatrixView<const float> rows) {
    KeyLearnerOptions options = KeyLearnerOptions::commvq(
        KeyCodecConfig::commvq_1bit({kHeadDim, kHeadDim, RopeLayout::kHalfSplit}));
    std::vector<KeyLearnerReport> reports;
    cuda::learn_key_codec(rows, options, &reports);
    return reports[0].refinement_objectives.back();
  });
  const double values = seconds_of("values", value_layers, 0.3, [](MatrixView<const float> rows) {
    ValueTrainerReport report;
    cuda::train_value_codec(
        rows, ValueTrainerOptions::commvq(ValueCodecConfig::commvq_1bit(kChannels)), &report);
    return report.refinement_objectives.back();
  });
  std::printf("{\"key_layers\": %d, \"key_seconds\": %.2f, \"value_layers\": %d, \"value_seconds\": %.2f}\n",
              key_layers, keys, value_layers, values);
}
