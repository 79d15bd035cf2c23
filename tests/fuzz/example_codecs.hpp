#pragma once

#include "commvq/io/codebook_file.hpp"

#include "reference/random_cache.hpp"

namespace commvq::fuzz {

/// A very small model, without layers.
inline ModelCodecs small_model() {
  ModelCodecs codecs;
  codecs.rope.pairs = {4, 4, RopeLayout::kHalfSplit};
  codecs.num_kv_heads = 2;
  codecs.model_digest = "d";
  return codecs;
}

/// Codecs of it: layers coded on both sides, on either and on none, tied and untied keys, weights,
/// 1-bit and 2-bit values, polished and not.
inline ModelCodecs example_codecs() {
  testing_support::Rng rng(5);
  ModelCodecs codecs = small_model();
  KeyCodecConfig tied;
  tied.pairs = codecs.rope.pairs;
  tied.group_pairs = 1;
  tied.codebook_size = 2;
  tied.num_stages = 2;
  KeyCodecConfig untied = tied;
  untied.tied = false;
  untied.group_pairs = 2;
  untied.beam_width = 2;
  untied.norm_per_head = true;
  std::vector<KeyCodebook<float>> weighted;
  const auto plain = testing_support::random_key_codec(rng, untied, codecs.num_kv_heads);
  for (int head = 0; head < codecs.num_kv_heads; ++head) {
    weighted.push_back(plain->codebook(head));
    weighted.back().pair_weights = {0.5f, 2.0f};
  }
  const auto polished = [&] {
    const auto codec = testing_support::random_value_codec(rng, 8, 2, 2);
    ValueCodecConfig config = codec->config();
    config.polish_sweeps = 2;
    return std::make_shared<const ValueCodec>(config, codec->weights());
  }();
  codecs.layers = {{testing_support::random_key_codec(rng, tied, codecs.num_kv_heads),
                    testing_support::random_value_codec(rng, 8, 1, 2)},
                   {std::make_shared<const KeyCodec>(std::move(weighted)), polished},
                   {plain, nullptr},
                   {nullptr, nullptr}};
  return codecs;
}

/// Codecs of one layer of it whose bits are graded on both sides: a byte of each key head and of
/// the values.
inline ModelCodecs graded_codecs() {
  testing_support::Rng rng(6);
  ModelCodecs codecs = small_model();
  KeyCodecConfig keys;
  keys.pairs = codecs.rope.pairs;
  keys.group_pairs = 2;
  keys.codebook_size = 2;
  keys.num_stages = 4;
  keys.tied = false;
  keys.graded = true;
  codecs.layers = {{testing_support::random_key_codec(rng, keys, codecs.num_kv_heads),
                    testing_support::random_value_codec(rng, 8, 1, 2, 1, true)}};
  return codecs;
}

}  // namespace commvq::fuzz
