// Coding the keys and values of 256 tokens of one layer in the shape of Llama-3.1-8B. Yardsticks in
// exact FP32: storing the same tokens as they are, and finding the keys' codes by trying all
// Nc^2 centres of every stage.

#include <vector>

#include "commvq/cache/cache.hpp"

#include <Eigen/Core>
#include <benchmark/benchmark.h>

#include "llama_layer.hpp"

namespace {

using namespace commvq;
using namespace commvq::bench;

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr Index kTokens = 256;

void count_tokens(benchmark::State& state) {
  state.counters["tokens/s"] = benchmark::Counter(static_cast<double>(kTokens),
                                                  benchmark::Counter::kIsIterationInvariantRate);
}

// {bits, beam width}
void encode_keys(benchmark::State& state) {
  Rng rng(1);
  KeyCodecConfig config = key_config(static_cast<int>(state.range(0)));
  config.beam_width = static_cast<int>(state.range(1));
  const auto codec = random_key_codec(rng, config);
  const std::vector<float> keys = normal_floats(rng, kTokens * kChannels, 1.0);
  std::vector<std::uint16_t> codes(
      static_cast<std::size_t>(kTokens * kNumKvHeads * config.num_codes()));
  std::vector<std::uint16_t> norms(kTokens);
  for (auto _ : state) {
    codec->encode(as_matrix(keys, kTokens, kChannels),
                  as_matrix(codes, kTokens, kNumKvHeads * config.num_codes()), norms.data());
    benchmark::DoNotOptimize(codes.data());
    benchmark::ClobberMemory();
  }
  count_tokens(state);
}

/// Every centre Z_0[A] + Z_1[B] of one stage, `[Nc^2][head_dim]`, and half its squared norm.
struct Centres {
  Matrix rows;
  Eigen::RowVectorXf half_norms;
};

std::vector<Centres> all_centres(const KeyCodebook<float>& codebook) {
  const Index size = codebook.config.codebook_size;
  std::vector<Centres> stages;
  for (int stage = 0; stage < codebook.config.num_stages; ++stage) {
    const Eigen::Map<const Matrix> a(codebook.book(0, stage, 0), size, kHeadDim);
    const Eigen::Map<const Matrix> b(codebook.book(0, stage, 1), size, kHeadDim);
    Centres& centres = stages.emplace_back();
    centres.rows.resize(size * size, kHeadDim);
    for (Index i = 0; i < size * size; ++i) centres.rows.row(i) = a.row(i / size) + b.row(i % size);
    centres.half_norms = 0.5f * centres.rows.rowwise().squaredNorm().transpose();
  }
  return stages;
}

// {bits}
void encode_keys_exhaustively_fp32(benchmark::State& state) {
  Rng rng(1);
  const auto codec = random_key_codec(rng, key_config(static_cast<int>(state.range(0))));
  std::vector<std::vector<Centres>> heads;
  for (int head = 0; head < kNumKvHeads; ++head)
    heads.push_back(all_centres(codec->codebook(head)));
  const std::vector<float> keys = normal_floats(rng, kTokens * kChannels, 1.0);
  const Eigen::Map<const Matrix> all(keys.data(), kTokens, kChannels);
  std::vector<Index> codes(static_cast<std::size_t>(kTokens));
  Matrix scores;
  for (auto _ : state) {
    const Eigen::VectorXf norms = all.rowwise().norm();
    for (int head = 0; head < kNumKvHeads; ++head) {
      Matrix residuals =
          norms.cwiseInverse().asDiagonal() * all.middleCols(head * kHeadDim, kHeadDim);
      for (const Centres& centres : heads[static_cast<std::size_t>(head)]) {
        scores.noalias() = residuals * centres.rows.transpose();
#pragma omp parallel for
        for (Index t = 0; t < kTokens; ++t) {
          (scores.row(t) - centres.half_norms).maxCoeff(&codes[static_cast<std::size_t>(t)]);
          residuals.row(t) -= centres.rows.row(codes[static_cast<std::size_t>(t)]);
        }
        benchmark::DoNotOptimize(codes.data());
        benchmark::ClobberMemory();
      }
    }
  }
  count_tokens(state);
}

// {bits}
void encode_values(benchmark::State& state) {
  Rng rng(1);
  const auto bits = static_cast<int>(state.range(0));
  const int hidden = ValueCodecConfig{static_cast<int>(kChannels), bits, 1}.num_code_bits() * 2;
  const auto codec = random_value_codec(rng, bits, hidden);
  const std::vector<float> values = normal_floats(rng, kTokens * kChannels, 1.0);
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(kTokens * codec->code_bytes()));
  std::vector<std::uint16_t> scales(kTokens);
  for (auto _ : state) {
    codec->encode(as_matrix(values, kTokens, kChannels),
                  as_matrix(codes, kTokens, codec->code_bytes()), scales.data());
    benchmark::DoNotOptimize(codes.data());
    benchmark::ClobberMemory();
  }
  count_tokens(state);
}

/// Keys and values of the same tokens into an exact FP32 cache.
void store_exact_fp32(benchmark::State& state) {
  Rng rng(1);
  CacheConfig config = cache_config();
  config.exact_type = FloatType::kFp32;
  const std::vector<float> keys = normal_floats(rng, kTokens * kChannels, 1.0);
  const std::vector<float> values = normal_floats(rng, kTokens * kChannels, 1.0);
  LayerCache cache(config, {});
  for (auto _ : state) {
    cache.append(as_matrix(keys, kTokens, kChannels), as_matrix(values, kTokens, kChannels));
    benchmark::ClobberMemory();
    cache.truncate(0);
  }
  count_tokens(state);
}

BENCHMARK(encode_keys)
    ->ArgNames({"bits", "beam"})
    ->Args({1, 1})
    ->Args({1, 8})
    ->Args({2, 1})
    ->Args({2, 8})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK(encode_keys_exhaustively_fp32)
    ->ArgName("bits")
    ->Arg(1)
    ->Arg(2)
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK(encode_values)
    ->ArgName("bits")
    ->Arg(1)
    ->Arg(2)
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK(store_exact_fp32)->UseRealTime()->Unit(benchmark::kMillisecond);

}  // namespace
