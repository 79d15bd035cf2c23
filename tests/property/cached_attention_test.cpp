#include <algorithm>
#include <cmath>

#include "commvq/attention/attention.hpp"

#include <gtest/gtest.h>

#include "reference/attention_reference.hpp"
#include "reference/instrumented.hpp"
#include "reference/random_cache.hpp"

namespace commvq {
namespace {

using testing_support::append_random;
using testing_support::normal_floats;
using testing_support::random_key_codec;
using testing_support::random_value_codec;
using testing_support::Rng;

int pick(Rng& rng, std::initializer_list<int> choices) {
  return *(choices.begin() + static_cast<std::ptrdiff_t>(rng() % choices.size()));
}

/// Attends with the newest `num_queries` positions and compares with the reference.
void expect_matches_reference(const LayerCache& cache, Rng& rng, int group, Index num_queries,
                              const AttentionOptions& options) {
  const Index cols = cache.config().num_channels() * group;
  const Index num_q_heads = Index{cache.config().num_kv_heads} * group;
  const std::vector<float> queries = normal_floats(rng, num_queries * cols);
  std::vector<float> output(queries.size());
  std::vector<float> lse(static_cast<std::size_t>(num_queries * num_q_heads));
  attend(cache, as_matrix(queries, num_queries, cols), options,
         as_matrix(output, num_queries, cols), lse.data());
  const auto expected = reference::attention(cache, as_matrix(queries, num_queries, cols), options);

  // Rows of keys and weights of values are summed in fixed point: their error is that of 16 bits,
  // not of floats, and a key's goes through the exponential.
  const double tolerance = cache.codec().keys ? 2e-3 : cache.codec().values ? 3e-4 : 5e-5;
  double largest = 1.0;
  for (const double value : expected.output) largest = std::max(largest, std::abs(value));
  for (std::size_t i = 0; i < output.size(); ++i)
    ASSERT_NEAR(output[i], expected.output[i], tolerance * largest) << "element " << i;
  for (std::size_t i = 0; i < lse.size(); ++i)
    ASSERT_NEAR(lse[i], expected.lse[i], tolerance * std::max(1.0, std::abs(expected.lse[i])));
}

CacheConfig random_cache_config(Rng& rng) {
  CacheConfig config;
  PairLayout& pairs = config.rope.pairs;
  pairs.head_dim = pick(rng, {4, 12, 16, 40, 64, 128});
  pairs.rotary_dim = pick(rng, {0, 1, 1}) ? pairs.head_dim : pairs.head_dim / 2;
  pairs.layout = pick(rng, {0, 1}) ? RopeLayout::kInterleaved : RopeLayout::kHalfSplit;
  config.rope.theta = pick(rng, {100, 10000, 500000});
  config.num_kv_heads = pick(rng, {2, 4});
  config.window = pick(rng, {0, 1, 7, 32, 128});
  config.sinks = pick(rng, {0, 0, 1, 4, 20});
  config.exact_type = static_cast<FloatType>(pick(rng, {0, 1, 2}));
  config.page_size = pick(rng, {8, 24, 64, 128});
  return config;
}

LayerCodec random_codec(Rng& rng, const CacheConfig& config) {
  LayerCodec codec;
  const int num_pairs = config.rope.pairs.num_pairs();
  if (rng() % 4 != 0) {
    KeyCodecConfig keys;
    keys.pairs = config.rope.pairs;
    keys.group_pairs = num_pairs % 2 == 0 ? pick(rng, {num_pairs, num_pairs / 2}) : num_pairs;
    keys.codebook_size = pick(rng, {2, 5, 16, 64});
    keys.num_stages = pick(rng, {1, 3, 6});
    keys.tied = rng() % 2 == 0;
    keys.norm_per_head = rng() % 2 == 0;
    codec.keys = random_key_codec(rng, keys, config.num_kv_heads);
  }
  if (rng() % 4 != 0)
    codec.values =
        random_value_codec(rng, static_cast<int>(config.num_channels()), pick(rng, {1, 2}), 16);
  return codec;
}

AttentionOptions random_options(Rng& rng) {
  AttentionOptions options;
  options.scale = rng() % 3 == 0 ? 0.3f : 0.0f;
  options.sliding_window = pick(rng, {0, 0, 1, 50, 300});
  options.soft_cap = rng() % 3 == 0 ? 5.0f : 0.0f;
  return options;
}

class RandomCache : public testing::TestWithParam<int> {};

TEST_P(RandomCache, AttendsLikeTheReference) {
  Rng rng(static_cast<std::uint64_t>(GetParam()));
  const CacheConfig config = random_cache_config(rng);
  LayerCache cache(config, random_codec(rng, config));
  const int group = pick(rng, {1, 2, 4, 5});
  for (int step = 0; step < 8; ++step) {
    SCOPED_TRACE(testing::Message() << "step " << step << ", length " << cache.length());
    const Index count = pick(rng, {1, 1, 2, 17, 70, 150});
    append_random(cache, rng, count);
    expect_matches_reference(cache, rng, group, std::min(count, Index{40}), random_options(rng));
    if (HasFatalFailure()) return;
    if (rng() % 4 == 0) cache.truncate(cache.length() - cache.length() / pick(rng, {3, 10, 50}));
    if (rng() % 4 == 0) cache = cache.fork();
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, RandomCache, testing::Range(0, testing_support::repeats(40, 10)));

// Blocks of one head, of several and of bits that are no multiple of a vector.
TEST(CachedAttention, MatchesReferenceWithBlocksOfValues) {
  Rng rng(16);
  for (const int head_dim : {40, 64})
    for (const int num_blocks : {2, 4})
      for (const int bits : {1, 2}) {
        SCOPED_TRACE(testing::Message() << head_dim << ", " << num_blocks << ", " << bits);
        CacheConfig config;
        config.rope.pairs.head_dim = config.rope.pairs.rotary_dim = head_dim;
        config.num_kv_heads = 4;
        config.window = 16;
        config.sinks = 2;
        const auto keys = KeyCodecConfig::speed_1bit(config.rope.pairs);
        LayerCache cache(config, {random_key_codec(rng, keys, 4),
                                  random_value_codec(rng, 4 * head_dim, bits, 16, num_blocks)});
        for (const Index count : {100, 3, 90}) append_random(cache, rng, count);
        expect_matches_reference(cache, rng, 2, 5, {});
      }
}

TEST(CachedAttention, MatchesReferenceAroundTheWindow) {
  Rng rng(11);
  CacheConfig config;
  config.rope.pairs.head_dim = config.rope.pairs.rotary_dim = 32;
  config.num_kv_heads = 2;
  config.window = 48;
  LayerCodec codec{random_key_codec(rng, KeyCodecConfig::paper_1bit(config.rope.pairs), 2),
                   random_value_codec(rng, 64, 1, 32)};
  for (const Index length : {Index{1}, config.window - 1, config.window, config.window + 1}) {
    SCOPED_TRACE(length);
    LayerCache cache(config, codec);
    append_random(cache, rng, length);
    expect_matches_reference(cache, rng, 2, length, {});
  }
}

// Long enough to be cut into several spans.
TEST(CachedAttention, MatchesReferenceOverThousandsOfTokens) {
  Rng rng(12);
  CacheConfig config;
  config.rope.pairs.head_dim = config.rope.pairs.rotary_dim = 32;
  config.num_kv_heads = 1;
  config.sinks = 4;
  LayerCache cache(config, {random_key_codec(rng, KeyCodecConfig::paper_2bit(config.rope.pairs), 1),
                            random_value_codec(rng, 32, 2, 32)});
  for (int chunk = 0; chunk < 10; ++chunk) append_random(cache, rng, 500);
  for (const Index num_queries : {1, 3, testing_support::repeats(150, 20)})
    expect_matches_reference(cache, rng, 4, num_queries, {});
}

// Angles of positions up to a million, where floats no longer count radians.
TEST(CachedAttention, KeepsItsPhaseAtAMillion) {
  Rng rng(13);
  CacheConfig config;
  config.rope.pairs.head_dim = config.rope.pairs.rotary_dim = 4;
  config.num_kv_heads = 1;
  config.exact_type = FloatType::kFp32;
  LayerCache cache(config, {});
  for (int chunk = 0; chunk < 10; ++chunk) append_random(cache, rng, 100000);
  append_random(cache, rng, 1);
  AttentionOptions options;
  options.scale = 4.0f;
  options.sliding_window = 3000;
  expect_matches_reference(cache, rng, 2, 1, options);
  options.sliding_window = 0;
  expect_matches_reference(cache, rng, 1, 1, options);
}

// Positions that no float tells apart, coded and exact; the reference looks at the newest tokens
// alone, in a sequence that is otherwise zeros.
TEST(CachedAttention, KeepsItsPhaseBeyondTheIntegersOfFloats) {
  constexpr Index kStart = (Index{1} << 24) - 60, kTokens = 200, kWindow = 64;
  Rng rng(15);
  CacheConfig config;
  config.rope.pairs.head_dim = config.rope.pairs.rotary_dim = 8;
  config.window = kWindow;
  config.page_size = 1 << 20;
  KeyCodecConfig keys = KeyCodecConfig::paper_2bit(config.rope.pairs);
  keys.group_pairs = 4;
  LayerCache cache(config, {random_key_codec(rng, keys, 1), random_value_codec(rng, 8, 1, 8)});
  // As a restored cache: its pages hold zeros, which decode to zero keys and values.
  const Index coded_end = kStart - kWindow, page_bytes = cache.page_layout().page_bytes();
  std::vector<PagePtr> pages;
  for (Index first = 0; first < coded_end; first += config.page_size)
    pages.push_back(std::make_shared<Page>(static_cast<std::size_t>(page_bytes)));
  const LayerExtent extent{kStart, coded_end, coded_end, coded_end};
  const std::vector<std::uint8_t> zeros(static_cast<std::size_t>(kWindow * 2 * 8 * 2));
  cache = LayerCache(config, cache.codec(), extent, cache.sink_store(),
                     ExactStore(config.exact_type, 8, zeros), std::move(pages));
  for (Index t = 0; t < kTokens; t += 10) append_random(cache, rng, 10);

  AttentionOptions options;
  options.sliding_window = kTokens;
  options.scale = 4.0f;
  const Index position = cache.length() - 1, first = cache.length() - kTokens;
  const std::vector<float> query = normal_floats(rng, 8);
  std::vector<float> output(query.size());
  attend(cache, as_matrix(query, 1, 8), options, as_matrix(output, 1, 8));
  std::vector<float> near_keys(kTokens * 8), near_values(near_keys.size());
  cache.decode_tokens(position, first, as_matrix(near_keys, kTokens, 8),
                      as_matrix(near_values, kTokens, 8));
  // The same score at positions counted from the window's beginning: RoPE knows distances alone.
  std::vector<double> expected(8);
  reference::attend_head(cache.rope(), query.data(), kTokens - 1, as_matrix(near_keys, kTokens, 8),
                         as_matrix(near_values, kTokens, 8), 0, options, expected.data());
  double largest = 1.0;
  for (const double value : expected) largest = std::max(largest, std::abs(value));
  for (std::size_t i = 0; i < output.size(); ++i)
    EXPECT_NEAR(output[i], expected[i], 2e-3 * largest) << i;
}

TEST(CachedAttention, ForksDoNotDisturbEachOther) {
  Rng rng(14);
  CacheConfig config;
  config.rope.pairs.head_dim = config.rope.pairs.rotary_dim = 16;
  config.num_kv_heads = 2;
  config.window = 8;
  LayerCache trunk(config, {random_key_codec(rng, KeyCodecConfig::paper_2bit(config.rope.pairs), 2),
                            random_value_codec(rng, 32, 1, 16)});
  append_random(trunk, rng, 100);
  const std::vector<float> query = normal_floats(rng, 32);
  const auto attend_once = [&](const LayerCache& cache) {
    std::vector<float> output(query.size());
    attend(cache, as_matrix(query, 1, 32), {}, as_matrix(output, 1, 32));
    return output;
  };
  const std::vector<float> before = attend_once(trunk);
  LayerCache branch = trunk.fork();
  EXPECT_EQ(attend_once(branch), before);
  branch.truncate(70);
  append_random(branch, rng, 60);
  EXPECT_EQ(attend_once(trunk), before);
  append_random(trunk, rng, 60);
  expect_matches_reference(branch, rng, 1, 60, {});
  expect_matches_reference(trunk, rng, 1, 60, {});
}

}  // namespace
}  // namespace commvq
