#pragma once

#include <memory>
#include <random>
#include <vector>

#include "commvq/cache/cache.hpp"

/// One layer in the shape of Llama-3.1-8B with random codecs and inputs: what the benchmarks run
/// on. Times do not depend on what the codecs learnt.
namespace commvq::bench {

constexpr int kNumQueryHeads = 32;
constexpr int kNumKvHeads = 8;
constexpr int kHeadDim = 128;
constexpr Index kChannels = kNumKvHeads * kHeadDim;

using Rng = std::mt19937_64;

inline std::vector<float> normal_floats(Rng& rng, Index count, double deviation) {
  std::normal_distribution<float> normal(0.0f, static_cast<float>(deviation));
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(rng);
  return values;
}

/// The paper's shape for so many bits.
inline KeyCodecConfig key_config(int bits) {
  const PairLayout pairs;
  return bits == 1 ? KeyCodecConfig::paper_1bit(pairs) : KeyCodecConfig::paper_2bit(pairs);
}

/// Tied codebooks whose stages shrink, as learnt ones do.
inline std::shared_ptr<const KeyCodec> random_key_codec(Rng& rng, const KeyCodecConfig& config) {
  std::vector<KeyCodebook<float>> heads;
  for (int head = 0; head < kNumKvHeads; ++head) {
    KeyCodebook<float>& codebook = heads.emplace_back(config);
    double size = 0.02;
    for (int stage = 0; stage < config.num_stages; ++stage, size *= 0.9) {
      const auto rows = normal_floats(rng, Index{config.codebook_size} * codebook.row_size(), size);
      std::copy(rows.begin(), rows.end(), codebook.book(0, stage, 0));
    }
    codebook.derive_tied_books();
  }
  return std::make_shared<const KeyCodec>(std::move(heads));
}

inline std::shared_ptr<const ValueCodec> random_value_codec(Rng& rng, int bits, int hidden_size) {
  const ValueCodecConfig config{static_cast<int>(kChannels), bits, hidden_size};
  ValueCodecWeights weights;
  weights.norm_gain.assign(kChannels, 1.0f);
  weights.norm_bias.assign(kChannels, 0.0f);
  weights.hidden_weight = normal_floats(rng, hidden_size * kChannels, 0.03);
  weights.hidden_bias = normal_floats(rng, hidden_size, 0.1);
  weights.output_weight = normal_floats(rng, Index{config.num_logits()} * hidden_size, 0.3);
  weights.output_bias = normal_floats(rng, config.num_logits(), 0.1);
  weights.decoder = normal_floats(rng, config.num_code_bits() * kChannels, 1.0);
  return std::make_shared<const ValueCodec>(config, std::move(weights));
}

inline CacheConfig cache_config() {
  CacheConfig config;
  config.rope.theta = 500000.0;
  config.rope.scaling = RopeScaling::kLlama3;
  config.rope.factor = 8.0;
  config.num_kv_heads = kNumKvHeads;
  return config;
}

}  // namespace commvq::bench
