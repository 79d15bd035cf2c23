#pragma once

#include <algorithm>

#include "reference/random_cache.hpp"

/// The caches of which saved ones are tested and fuzzed.
namespace commvq::testing_support {

inline CacheConfig small_config() {
  CacheConfig config;
  config.rope.pairs.head_dim = config.rope.pairs.rotary_dim = 4;
  config.num_kv_heads = 2;
  config.window = 4;
  config.sinks = 1;
  config.page_size = 8;
  return config;
}

/// Books of five rows: codes of three bits, some of which point nowhere.
inline LayerCodec small_codec(std::uint64_t seed, bool norm_per_head = false) {
  Rng rng(seed);
  KeyCodecConfig keys;
  keys.pairs = small_config().rope.pairs;
  keys.group_pairs = 2;
  keys.codebook_size = 5;
  keys.num_stages = 2;
  keys.norm_per_head = norm_per_head;
  keys.tied = !norm_per_head;
  return {random_key_codec(rng, keys, 2), random_value_codec(rng, 8, 1, 4)};
}

/// Both sides coded, one, the other, none.
inline std::vector<LayerCodec> small_codecs() {
  const LayerCodec both = small_codec(1), other = small_codec(2, true);
  return {both, {other.keys, nullptr}, {nullptr, other.values}, {}};
}

inline Cache random_cache(const CacheConfig& config, Index tokens, std::uint64_t seed) {
  Rng rng(seed);
  Cache cache(config, small_codecs());
  for (int i = 0; i < cache.num_layers(); ++i)
    for (Index done = 0; done < tokens; done += 7)
      append_random(cache.layer(i), rng, std::min(Index{7}, tokens - done));
  return cache;
}

}  // namespace commvq::testing_support
