// One decoding step of one layer, in the shape of Llama-3.1-8B (32 query heads, 8 KV heads of 128
// channels): attention over the compressed cache, and exact FP32 flash-decoding as the yardstick.

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#include "commvq/attention/attention.hpp"

#include <benchmark/benchmark.h>

#include "attention/simd.hpp"
#include "attention/tile_kernels.hpp"
#include "llama_layer.hpp"

namespace {

using namespace commvq;
using namespace commvq::bench;
using attention::kSubtile;
using attention::kTile;
using simd::LineVector;
using simd::Vec;

constexpr int kGroup = kNumQueryHeads / kNumKvHeads;

LayerCache fill_cache(int bits, Index length) {
  Rng rng(1);
  // A small encoder network, since filling the cache is not what is timed.
  LayerCache cache(cache_config(),
                   {random_key_codec(rng, key_config(bits)), random_value_codec(rng, bits, 16)});
  const Index chunk = 512;
  for (Index first = 0; first < length; first += chunk) {
    const std::vector<float> keys = normal_floats(rng, chunk * kChannels, 1.0);
    const std::vector<float> values = normal_floats(rng, chunk * kChannels, 1.0);
    cache.append(as_matrix(keys, chunk, kChannels), as_matrix(values, chunk, kChannels));
  }
  return cache;
}

/// Each cache is filled once, however often a case is run to find its number of iterations.
const LayerCache& random_cache(int bits, Index length) {
  static std::map<std::pair<int, Index>, LayerCache> caches;
  const auto found = caches.find({bits, length});
  if (found != caches.end()) return found->second;
  return caches.emplace(std::pair(bits, length), fill_cache(bits, length)).first->second;
}

/// Exact attention over keys that are already rotated: per KV head contiguous `[tokens][head_dim]`
/// keys and values. Tokens are split, tiles use an online softmax, the query heads of a KV head
/// share every load; the inner loops are those of the library.
class ExactDecoding {
 public:
  explicit ExactDecoding(Index length) : length_(length) {
    Rng rng(1);
    for (auto* const side : {&keys_, &values_}) {
      const std::vector<float> floats = normal_floats(rng, length * kChannels, 1.0);
      side->assign(floats.begin(), floats.end());
    }
    partials_.resize(static_cast<std::size_t>(kNumKvHeads * num_parts()));
  }

  void attend(const LineVector<float>& queries, LineVector<float>& output) {
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
      for (Index item = 0; item < kNumKvHeads * num_parts(); ++item)
        run_part(queries, item / num_parts(), item % num_parts(),
                 partials_[static_cast<std::size_t>(item)]);
#pragma omp for
      for (int row = 0; row < kNumQueryHeads; ++row) merge(row, output);
    }
  }

 private:
  static constexpr Index kPartTokens = 1024;
  struct Partial {
    alignas(64) float values[kGroup][kHeadDim];
    float max[kGroup];
    float sum[kGroup];
  };

  Index num_parts() const {
    return length_ / kPartTokens;
  }

  void run_part(const LineVector<float>& queries, Index head, Index part, Partial& partial) const {
    partial = {};
    std::fill(partial.max, partial.max + kGroup, -std::numeric_limits<float>::infinity());
    const Index first = head * length_ + part * kPartTokens;
    for (Index n = first; n < first + kPartTokens; n += kTile) {
      alignas(64) float scores[kGroup][kTile];
      for (int t = 0; t < kTile; t += kSubtile)
        attention::score_subtile(queries.data() + head * kGroup * kHeadDim, kGroup,
                                 keys_.data() + (n + t) * kHeadDim, kHeadDim, scores[0] + t);
      for (int row = 0; row < kGroup; ++row) weigh(scores[row], partial, row);
      attention::add_values(values_.data() + n * kHeadDim, kTile, kHeadDim, scores[0], kGroup,
                            partial.values[0], kHeadDim);
    }
  }

  static void weigh(float* scores, Partial& partial, int row) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
    float largest = partial.max[row];
    for (int t = 0; t < kTile; ++t) largest = std::max(largest, scores[t] * scale);
    const float factor = std::exp(partial.max[row] - largest);
    Vec sum{};
    for (int t = 0; t < kTile; t += simd::kLanes) {
      const Vec weight = simd::exp_nonpositive(simd::load(scores + t) * scale - largest);
      simd::store(scores + t, weight);
      sum += weight;
    }
    float total = 0;
    for (int lane = 0; lane < simd::kLanes; ++lane) total += sum[lane];
    partial.sum[row] = partial.sum[row] * factor + total;
    partial.max[row] = largest;
    for (float& value : partial.values[row]) value *= factor;
  }

  void merge(int row, LineVector<float>& output) const {
    const Partial* const parts = partials_.data() + row / kGroup * num_parts();
    float largest = parts[0].max[row % kGroup];
    for (Index p = 1; p < num_parts(); ++p) largest = std::max(largest, parts[p].max[row % kGroup]);
    float* const out = output.data() + row * kHeadDim;
    std::fill(out, out + kHeadDim, 0.0f);
    float sum = 0;
    for (Index p = 0; p < num_parts(); ++p) {
      const float factor = std::exp(parts[p].max[row % kGroup] - largest);
      sum += factor * parts[p].sum[row % kGroup];
      for (int d = 0; d < kHeadDim; ++d) out[d] += factor * parts[p].values[row % kGroup][d];
    }
    for (int d = 0; d < kHeadDim; ++d) out[d] /= sum;
  }

  Index length_;
  LineVector<float> keys_;
  LineVector<float> values_;
  std::vector<Partial> partials_;
};

std::vector<float> random_queries(Index count) {
  Rng rng(2);
  return normal_floats(rng, count * kNumQueryHeads * kHeadDim, 1.0);
}

void attend_coded(benchmark::State& state, int bits) {
  const Index num_queries = state.range(1);
  const LayerCache& cache = random_cache(bits, state.range(0));
  const std::vector<float> queries = random_queries(num_queries);
  std::vector<float> output(queries.size());
  const Index cols = kNumQueryHeads * kHeadDim;
  for (auto _ : state) {
    attend(cache, as_matrix(queries, num_queries, cols), {}, as_matrix(output, num_queries, cols));
    benchmark::DoNotOptimize(output.data());
    benchmark::ClobberMemory();
  }
  state.counters["cache_MB"] = static_cast<double>(cache.allocated_bytes()) / 1e6;
}

void commvq_1bit(benchmark::State& state) {
  attend_coded(state, 1);
}
void commvq_2bit(benchmark::State& state) {
  attend_coded(state, 2);
}

void exact_fp32(benchmark::State& state) {
  ExactDecoding decoding(state.range(0));
  const std::vector<float> floats = random_queries(1);
  const LineVector<float> queries(floats.begin(), floats.end());
  LineVector<float> output(queries.size());
  for (auto _ : state) {
    decoding.attend(queries, output);
    benchmark::DoNotOptimize(output.data());
    benchmark::ClobberMemory();
  }
  state.counters["cache_MB"] = static_cast<double>(state.range(0) * kChannels * 8) / 1e6;
}

// {tokens, queries}
BENCHMARK(commvq_1bit)
    ->Args({4096, 1})
    ->Args({32768, 1})
    ->Args({4096, 128})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK(commvq_2bit)
    ->Args({4096, 1})
    ->Args({32768, 1})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK(exact_fp32)
    ->Args({4096, 1})
    ->Args({32768, 1})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);

}  // namespace
