// Learns codecs for one layer's keys and values, compresses them, attends over the codes.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "commvq/commvq.hpp"

int main() {
  commvq::CacheConfig config;  // RoPE of theta 10,000 on heads of 128
  config.num_kv_heads = 2;
  const commvq::Index tokens = 2048, channels = config.num_channels();

  // Stand-ins for what a model computes: [tokens][num_kv_heads * head_dim], keys before RoPE.
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> basis(16 * channels), keys(tokens * channels), values(tokens * channels);
  for (float& x : basis) x = normal(random);
  for (auto* side : {&keys, &values})
    for (commvq::Index t = 0; t < tokens; ++t)
      for (int b = 0; b < 16; ++b) {
        const float weight = normal(random);
        for (commvq::Index c = 0; c < channels; ++c)
          (*side)[t * channels + c] += weight * basis[b * channels + c];
      }
  const commvq::MatrixView<const float> key_view(keys.data(), tokens, channels);
  const commvq::MatrixView<const float> value_view(values.data(), tokens, channels);

  // Learn the codecs once per model; save_codecs() keeps them in a file.
  const auto key_options =
      commvq::KeyLearnerOptions::commvq(commvq::KeyCodecConfig::commvq_1bit(config.rope.pairs));
  commvq::ValueTrainerOptions value_options;
  value_options.codec = commvq::ValueCodecConfig::paper_1bit(static_cast<int>(channels));
  value_options.steps = 300;
  const commvq::LayerCodec codec{
      std::make_shared<commvq::KeyCodec>(commvq::learn_key_codec(key_view, key_options)),
      std::make_shared<commvq::ValueCodec>(commvq::train_value_codec(value_view, value_options))};

  // The cache of one sequence. A null codec would keep its side exact.
  commvq::LayerCache cache(config, codec), exact(config, {});
  cache.append(key_view, value_view);
  exact.append(key_view, value_view);

  // Eight query heads at the newest position, before RoPE.
  const commvq::Index q_channels = 8 * config.rope.pairs.head_dim;
  std::vector<float> query(q_channels), output(q_channels), expected(q_channels);
  for (float& x : query) x = normal(random) / 8;
  commvq::attend(cache, {query.data(), 1, q_channels}, {}, {output.data(), 1, q_channels});
  commvq::attend(exact, {query.data(), 1, q_channels}, {}, {expected.data(), 1, q_channels});

  double error = 0, total = 0;
  for (commvq::Index i = 0; i < q_channels; ++i) {
    error += std::pow(output[i] - expected[i], 2);
    total += std::pow(expected[i], 2);
  }
  std::printf("%.1f bytes a token instead of %.1f in FP16; relative error of attention %.3f\n",
              cache.bytes_per_token(), 4.0 * static_cast<double>(channels),
              std::sqrt(error / total));
}
