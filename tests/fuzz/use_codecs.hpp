#pragma once

#include <cmath>

#include "commvq/attention/attention.hpp"
#include "commvq/io/codebook_file.hpp"

#include "fuzz/harness.hpp"
#include "reference/random_cache.hpp"

namespace commvq::fuzz {

/// Appends `tokens` random tokens and attends over all: to finite numbers or a readable `Error`.
inline void use_cache(LayerCache& cache, testing_support::Rng& rng, Index tokens) {
  const Index channels = cache.config().num_channels();
  std::vector<float> output(static_cast<std::size_t>(channels));
  const std::vector<float> query = testing_support::normal_floats(rng, channels);
  try {
    testing_support::append_random(cache, rng, tokens);
    attend(cache, as_matrix(query, 1, channels), {}, as_matrix(output, 1, channels));
    for (const float x : output) demand(std::isfinite(x), "attention that is not finite");
  } catch (const Error& error) {
    demand_readable(error.what());
  }
}

/// Codecs that a reader accepted must work: every layer of them codes some tokens and attends over
/// them, to finite numbers or a readable `Error`. Large models are left out, for speed.
inline void use_codecs(const ModelCodecs& codecs) {
  constexpr Index kMostChannels = 64, kTokens = 40;
  CacheConfig config;
  config.rope = codecs.rope;
  config.num_kv_heads = codecs.num_kv_heads;
  config.window = 4;
  config.page_size = 8;
  if (config.num_channels() > kMostChannels || codecs.layers.size() > 8) return;
  testing_support::Rng rng(3);
  for (const LayerCodec& layer : codecs.layers) {
    if (layer.keys &&
        (layer.keys->config().num_codes() > 64 || layer.keys->config().codebook_size > 64 ||
         layer.keys->config().beam_width > 16))
      continue;
    try {
      LayerCache cache(config, layer);
      use_cache(cache, rng, kTokens);
    } catch (const Error& error) {
      demand_readable(error.what());
    }
  }
}

}  // namespace commvq::fuzz
