#pragma once

#include <memory>
#include <random>
#include <vector>

#include "commvq/cache/cache.hpp"

/// Random codecs and inputs for tests of cache and attention.
namespace commvq::testing_support {

using Rng = std::mt19937_64;

inline std::vector<float> normal_floats(Rng& rng, Index count, double deviation = 1.0) {
  std::normal_distribution<float> normal(0.0f, static_cast<float>(deviation));
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(rng);
  return values;
}

/// Codebooks whose stages shrink, as learnt ones do.
inline std::shared_ptr<const KeyCodec> random_key_codec(Rng& rng, const KeyCodecConfig& config,
                                                        int num_kv_heads) {
  std::vector<KeyCodebook<float>> heads;
  for (int head = 0; head < num_kv_heads; ++head) {
    KeyCodebook<float>& codebook = heads.emplace_back(config);
    // Of about the same size, however many stages there are.
    const bool many = config.num_stages > 32;
    const double shrinking = many ? 0.97 : 0.8;
    double size = (many ? 0.2 : 0.5) / std::sqrt(double(config.pairs.head_dim) * num_kv_heads);
    if (config.graded) size /= 2;  // a byte's numbers have up to four times a bit's vector
    for (int stage = 0; stage < config.num_stages; ++stage, size *= shrinking)
      for (int group = 0; group < config.num_groups(); ++group)
        for (int which = 0; which < 2; ++which) {
          const Index count = Index{config.codebook_size} * codebook.row_size();
          const std::vector<float> rows = normal_floats(rng, count, size);
          std::copy(rows.begin(), rows.end(), codebook.book(group, stage, which));
        }
    if (config.tied) codebook.derive_tied_books();
    if (config.graded) codebook.derive_graded_rows();
  }
  return std::make_shared<const KeyCodec>(std::move(heads));
}

inline std::shared_ptr<const ValueCodec> random_value_codec(Rng& rng, int num_channels, int bits,
                                                            int hidden_size, int num_blocks = 1,
                                                            bool graded = false) {
  ValueCodecConfig config;
  config.num_channels = num_channels;
  config.bits = bits;
  config.hidden_size = hidden_size;
  config.num_blocks = num_blocks;
  config.graded = graded;
  const int of_block = num_channels / num_blocks;
  ValueCodecWeights weights;
  weights.norm_gain.assign(static_cast<std::size_t>(num_channels), 1.0f);
  weights.norm_bias.assign(static_cast<std::size_t>(num_channels), 0.0f);
  weights.hidden_weight =
      normal_floats(rng, Index{hidden_size} * num_channels, 1 / std::sqrt(double(of_block)));
  weights.hidden_bias = normal_floats(rng, Index{hidden_size} * num_blocks, 0.1);
  weights.output_weight = normal_floats(rng, Index{config.num_logits()} * hidden_size,
                                        1 / std::sqrt(double(hidden_size)));
  weights.output_bias = normal_floats(rng, config.num_logits(), 0.1);
  weights.decoder = normal_floats(rng, Index{config.num_code_bits()} * of_block);
  if (graded) weights.derive_graded_rows(of_block);
  return std::make_shared<const ValueCodec>(config, std::move(weights));
}

/// Appends `count` random tokens in one call.
inline void append_random(LayerCache& cache, Rng& rng, Index count) {
  const Index channels = cache.config().num_channels();
  const std::vector<float> keys = normal_floats(rng, count * channels);
  const std::vector<float> values = normal_floats(rng, count * channels);
  cache.append(as_matrix(keys, count, channels), as_matrix(values, count, channels));
}

}  // namespace commvq::testing_support
