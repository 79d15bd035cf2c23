#include "commvq/cache/cache.hpp"

#include <cmath>
#include <limits>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "reference/random_cache.hpp"

namespace commvq {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;
using testing_support::append_random;
using testing_support::normal_floats;
using testing_support::random_key_codec;
using testing_support::random_value_codec;
using testing_support::Rng;

constexpr Index kChannels = 64;

CacheConfig small_config() {
  CacheConfig config;
  config.rope.pairs.head_dim = config.rope.pairs.rotary_dim = 32;
  config.num_kv_heads = 2;
  config.window = 20;
  config.sinks = 3;
  return config;
}

LayerCodec small_codec() {
  Rng rng(1);
  return {random_key_codec(rng, KeyCodecConfig::paper_1bit(small_config().rope.pairs), 2),
          random_value_codec(rng, kChannels, 1, 16)};
}

struct Tokens {
  std::vector<float> keys, values;
  Index count() const { return static_cast<Index>(keys.size()) / kChannels; }
  MatrixView<const float> key_rows(Index first, Index rows) const {
    return as_matrix(keys, count(), kChannels).middle_rows(first, rows);
  }
  MatrixView<const float> value_rows(Index first, Index rows) const {
    return as_matrix(values, count(), kChannels).middle_rows(first, rows);
  }
};

Tokens random_tokens(Index count, std::uint64_t seed = 2) {
  Rng rng(seed);
  return {normal_floats(rng, count * kChannels), normal_floats(rng, count * kChannels)};
}

void append(LayerCache& cache, const Tokens& tokens, Index first, Index count) {
  cache.append(tokens.key_rows(first, count), tokens.value_rows(first, count));
}

/// What the newest query sees: keys, then values, of every token.
Tokens seen(const LayerCache& cache, Index position) {
  Tokens tokens{std::vector<float>(static_cast<std::size_t>(cache.length() * kChannels)),
                std::vector<float>(static_cast<std::size_t>(cache.length() * kChannels))};
  cache.decode_tokens(position, 0, as_matrix(tokens.keys, cache.length(), kChannels),
                      as_matrix(tokens.values, cache.length(), kChannels));
  return tokens;
}
Tokens seen(const LayerCache& cache) {
  return seen(cache, cache.length() - 1);
}

std::vector<float> rounded(MatrixView<const float> row, FloatType type) {
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(kChannels * size_of(type)));
  std::vector<float> result(kChannels);
  round_floats(row.data, kChannels, type, bytes.data());
  widen_floats(bytes.data(), kChannels, type, result.data());
  return result;
}

std::vector<float> row_of(const std::vector<float>& rows, Index token) {
  return {rows.begin() + token * kChannels, rows.begin() + (token + 1) * kChannels};
}

TEST(LayerCache, KeepsSinksAndWindowExactAndCodesTheRest) {
  const CacheConfig config = small_config();
  LayerCache cache(config, small_codec());
  const Tokens tokens = random_tokens(200);
  append(cache, tokens, 0, 150);
  for (Index t = 150; t < 200; ++t) append(cache, tokens, t, 1);
  const Tokens found = seen(cache);
  for (Index t = 0; t < 200; ++t) {
    const bool exact = t < config.sinks || t >= 200 - config.window;
    EXPECT_EQ(row_of(found.keys, t) == rounded(tokens.key_rows(t, 1), config.exact_type), exact)
        << t;
    EXPECT_EQ(row_of(found.values, t) == rounded(tokens.value_rows(t, 1), config.exact_type), exact)
        << t;
  }
}

TEST(LayerCache, CodedTokensAreThoseOfTheCodecs) {
  const CacheConfig config = small_config();
  const LayerCodec codec = small_codec();
  LayerCache cache(config, codec);
  const Tokens tokens = random_tokens(120);
  append(cache, tokens, 0, 120);
  const Tokens found = seen(cache);
  for (const Index t : {3, 4, 50, 99}) {
    const std::vector<float> key = rounded(tokens.key_rows(t, 1), config.exact_type);
    const std::vector<float> value = rounded(tokens.value_rows(t, 1), config.exact_type);
    // The codecs' results are the ones nearest the token, so they cannot depend on the cache.
    LayerCache alone(
        [&] {
          CacheConfig no_window = config;
          no_window.window = no_window.sinks = 0;
          return no_window;
        }(),
        codec);
    alone.append(as_matrix(key, 1, kChannels), as_matrix(value, 1, kChannels));
    const Tokens expected = seen(alone);
    EXPECT_EQ(row_of(found.keys, t), expected.keys) << t;
    EXPECT_EQ(row_of(found.values, t), expected.values) << t;
  }
}

TEST(LayerCache, GroupingOfAppendsDoesNotChangeWhatIsSeen) {
  const Tokens tokens = random_tokens(400);
  LayerCache whole(small_config(), small_codec());
  append(whole, tokens, 0, 400);
  for (const Index chunk : {1, 7, 64, 129}) {
    LayerCache cache(small_config(), small_codec());
    for (Index first = 0; first < 400; first += chunk)
      append(cache, tokens, first, std::min(chunk, 400 - first));
    EXPECT_EQ(seen(cache).keys, seen(whole).keys) << chunk;
    EXPECT_EQ(seen(cache).values, seen(whole).values) << chunk;
  }
}

TEST(LayerCache, EveryQueryOfAChunkHasItsOwnWindow) {
  LayerCache cache(small_config(), small_codec());
  const Tokens tokens = random_tokens(300);
  append(cache, tokens, 0, 200);
  append(cache, tokens, 200, 100);
  for (const Index position : {200, 201, 250, 299}) {
    EXPECT_EQ(cache.coded_end_for(position), position + 1 - 20);
    const Tokens found = seen(cache, position);
    const auto exact = [&](Index t) {
      return row_of(found.keys, t) == rounded(tokens.key_rows(t, 1), FloatType::kBf16);
    };
    EXPECT_FALSE(exact(position - 20));
    EXPECT_TRUE(exact(position - 19));
  }
}

TEST(LayerCache, RefusesQueriesOlderThanItsExactCopies) {
  Rng rng(3);
  LayerCache cache(small_config(), small_codec());
  append_random(cache, rng, 2000);
  append_random(cache, rng, 1);
  ASSERT_GT(cache.first_query_position(), 0);
  ASSERT_LE(cache.first_query_position(), 2000);
  EXPECT_THAT([&] { seen(cache, cache.first_query_position() - 1); },
              ThrowsMessage<Error>(HasSubstr("query position")));
  EXPECT_THAT([&] { seen(cache, 2001); }, ThrowsMessage<Error>(HasSubstr("2001")));
}

TEST(LayerCache, ExactCacheRoundsAndNothingElse) {
  for (const FloatType type : {FloatType::kBf16, FloatType::kFp16, FloatType::kFp32}) {
    CacheConfig config = small_config();
    config.exact_type = type;
    LayerCache cache(config, {});
    const Tokens tokens = random_tokens(150);
    append(cache, tokens, 0, 150);
    const Tokens found = seen(cache);
    for (Index t = 0; t < 150; ++t) {
      EXPECT_EQ(row_of(found.keys, t), rounded(tokens.key_rows(t, 1), type));
      EXPECT_EQ(row_of(found.values, t), rounded(tokens.value_rows(t, 1), type));
    }
  }
}

TEST(LayerCache, TruncatedAndRefilledCacheEqualsAFreshOne) {
  const Tokens tokens = random_tokens(300);
  const Tokens others = random_tokens(300, 5);
  for (const Index length : {0, 1, 3, 4, 19, 20, 23, 24, 180, 199, 200}) {
    LayerCache cache(small_config(), small_codec());
    append(cache, others, 0, length);
    append(cache, tokens, length, 250 - length);
    LayerCache again(small_config(), small_codec());
    append(again, others, 0, length);
    append(again, others, length, 200 - length);
    again.truncate(length);
    EXPECT_EQ(again.length(), length);
    append(again, tokens, length, 250 - length);
    EXPECT_EQ(seen(again).keys, seen(cache).keys) << length;
    EXPECT_EQ(seen(again).values, seen(cache).values) << length;
  }
}

TEST(LayerCache, TruncateRefusesWhatItDoesNotHold) {
  Rng rng(6);
  LayerCache cache(small_config(), small_codec());
  append_random(cache, rng, 10);
  EXPECT_THAT([&] { cache.truncate(11); },
              ThrowsMessage<Error>(AllOf(HasSubstr("10"), HasSubstr("11"))));
  EXPECT_THAT([&] { cache.truncate(-1); }, ThrowsMessage<Error>(HasSubstr("-1")));
  cache.clear();
  EXPECT_EQ(cache.length(), 0);
}

TEST(LayerCache, ForksSharePagesUntilTheyWrite) {
  Rng rng(7);
  LayerCache trunk(small_config(), small_codec());
  append_random(trunk, rng, 400);
  LayerCache fork = trunk.fork();
  EXPECT_EQ(fork.pages(), trunk.pages());
  const Tokens before = seen(trunk);
  append_random(fork, rng, 200);
  EXPECT_EQ(seen(trunk).keys, before.keys);
  // The pages that were full when the fork was taken are the same memory still.
  const auto full = static_cast<std::size_t>((trunk.coded_end() - 3) / 64);
  ASSERT_GE(full, 5u);
  for (std::size_t page = 0; page < full; ++page)
    EXPECT_EQ(fork.pages()[page], trunk.pages()[page]);
  const Tokens after = seen(fork);
  EXPECT_TRUE(
      std::equal(before.keys.begin(), before.keys.begin() + 380 * kChannels, after.keys.begin()));
}

TEST(LayerCache, CodesOfASharedPromptAreStoredOnce) {
  Rng rng(15);
  LayerCache prompt(small_config(), small_codec());
  append_random(prompt, rng, 700);
  constexpr std::size_t kForks = 50;
  std::vector<LayerCache> forks(kForks, prompt);
  for (LayerCache& fork : forks) append_random(fork, rng, 40);
  std::set<const Page*> pages;
  for (const LayerCache& fork : forks)
    for (const PagePtr& page : fork.pages()) pages.insert(page.get());
  const auto full = static_cast<std::size_t>((prompt.coded_end() - 3) / 64);
  ASSERT_GE(full, 10u);
  const std::size_t own = forks[0].pages().size() - full;
  ASSERT_GE(own, 1u);
  EXPECT_EQ(pages.size(), full + own * kForks);  // only the pages that each of them wrote
  forks.clear();
  for (const PagePtr& page : prompt.pages()) EXPECT_EQ(page.use_count(), 1);
}

// Speculative decoding: some tokens are tried in one call, the first few of them are kept.
TEST(LayerCache, RejectedTokensLeaveNoTrace) {
  Rng rng(16);
  const Tokens tokens = random_tokens(600), rejected = random_tokens(600, 17);
  LayerCache plain(small_config(), small_codec()), speculating(small_config(), small_codec());
  for (Index length = 0; length < 500;) {
    const auto tried = static_cast<Index>(1 + rng() % 8);
    const auto kept = static_cast<Index>(rng() % static_cast<std::uint64_t>(tried)) + 1;
    append(speculating, tokens, length, kept);
    append(speculating, rejected, length, tried - kept);
    speculating.truncate(length + kept);
    for (Index t = 0; t < kept; ++t) append(plain, tokens, length + t, 1);
    length += kept;
    ASSERT_EQ(speculating.length(), length);
    ASSERT_LE(speculating.first_query_position(), length - 1);
    ASSERT_EQ(seen(speculating).keys, seen(plain).keys) << length;
    ASSERT_EQ(seen(speculating).values, seen(plain).values) << length;
  }
}

TEST(LayerCache, NoPositionOverflows) {
  Rng rng(18);
  CacheConfig config = small_config();
  config.window = kMaxTokens;
  LayerCache cache(config, small_codec());
  append_random(cache, rng, 100);
  EXPECT_EQ(cache.first_query_position(), 0);
  EXPECT_EQ(cache.coded_end_for(99), config.sinks);  // all in the window
  cache.truncate(50);
  append_random(cache, rng, 100);
  EXPECT_EQ(cache.length(), 150);
  const float nothing = 0;
  const MatrixView<const float> endless(&nothing, kMaxTokens, kChannels, kChannels);
  EXPECT_THAT([&] { cache.append(endless, endless); },
              ThrowsMessage<Error>(AllOf(HasSubstr("150"), HasSubstr(std::to_string(kMaxTokens)))));
  EXPECT_EQ(cache.length(), 150);
}

TEST(LayerCache, BytesPerTokenAreThosePagesAllocate) {
  Rng rng(8);
  for (const int bits : {1, 2}) {
    CacheConfig config = small_config();
    const KeyCodecConfig keys = bits == 1 ? KeyCodecConfig::paper_1bit(config.rope.pairs)
                                          : KeyCodecConfig::paper_2bit(config.rope.pairs);
    const LayerCodec both{random_key_codec(rng, keys, 2),
                          random_value_codec(rng, kChannels, bits, 8)};
    for (const LayerCodec& codec :
         {both, LayerCodec{both.keys, nullptr}, LayerCodec{nullptr, both.values}, LayerCodec{}}) {
      LayerCache cache(config, codec);
      append_random(cache, rng, 1000);
      Index pages = 0;
      for (const PagePtr& page : cache.pages()) pages += static_cast<Index>(page->capacity());
      const Index per_page =
          static_cast<Index>(cache.bytes_per_token() * static_cast<double>(config.page_size));
      EXPECT_EQ(pages, per_page * static_cast<Index>(cache.pages().size()));
      EXPECT_GE(cache.allocated_bytes(), pages);
      EXPECT_EQ(cache.allocated_bytes() - pages,
                cache.sink_store().allocated_bytes() + cache.exact_store().allocated_bytes());
    }
  }
}

// Norms and scale in bf16 and log2(64) + log2(64) bits a stage; 1 or 2 bits a value number.
TEST(LayerCache, BytesPerTokenOfLlama31) {
  Rng rng(9);
  CacheConfig config;
  config.num_kv_heads = 8;
  const auto bits_with = [&](const KeyCodecConfig& keys, int bits) {
    return LayerCache(config,
                      {random_key_codec(rng, keys, 8), random_value_codec(rng, 1024, bits, 8)})
        .bits_per_token();
  };
  const PairLayout& pairs = config.rope.pairs;
  EXPECT_EQ(bits_with(KeyCodecConfig::paper_1bit(pairs), 1), 8 * 11 * 12 + 16 + 1024 + 16);
  EXPECT_EQ(bits_with(KeyCodecConfig::paper_2bit(pairs), 2), 8 * 21 * 12 + 16 + 2048 + 16);
  const Index one_bit = bits_with(KeyCodecConfig::commvq_1bit(pairs), 1);
  const Index two_bit = bits_with(KeyCodecConfig::commvq_2bit(pairs), 2);
  EXPECT_EQ(one_bit, 8 * (11 * 12 + 16) + 1024 + 16);
  EXPECT_EQ(two_bit, 8 * (20 * 12 + 16) + 2048 + 16);
  EXPECT_LE(one_bit, 1.10 * 2048);
  EXPECT_LE(two_bit, 2.05 * 2048);
}

TEST(LayerCache, BytesPerTokenOfSpeedPresets) {
  Rng rng(9);
  for (const int head_dim : {64, 128, 256}) {
    CacheConfig config;
    config.num_kv_heads = 2;
    PairLayout& pairs = config.rope.pairs;
    pairs.head_dim = pairs.rotary_dim = head_dim;
    const auto bits_of = [&](const KeyCodecConfig& keys, const ValueCodecConfig& values) {
      return LayerCache(config, {random_key_codec(rng, keys, 2),
                                 random_value_codec(rng, values.num_channels, values.bits, 8,
                                                    values.num_blocks)})
          .bits_per_token();
    };
    const Index one_bit =
        bits_of(KeyCodecConfig::speed_1bit(pairs), ValueCodecConfig::speed_1bit(2 * head_dim, 2));
    const Index two_bit =
        bits_of(KeyCodecConfig::speed_2bit(pairs), ValueCodecConfig::speed_2bit(2 * head_dim, 2));
    EXPECT_EQ(one_bit, 2 * (120 * head_dim / 128 + 16 + head_dim + 16));
    EXPECT_EQ(two_bit, 2 * (248 * head_dim / 128 + 16 + 2 * head_dim + 16));
    if (head_dim < 128) continue;
    EXPECT_LE(one_bit, 1.10 * 4 * head_dim);
    EXPECT_LE(two_bit, 2.10 * 4 * head_dim);
  }
}

TEST(LayerCache, RefusesBlocksThatCutHeads) {
  Rng rng(9);
  CacheConfig config;
  config.rope.pairs.head_dim = config.rope.pairs.rotary_dim = 16;
  config.num_kv_heads = 2;
  EXPECT_THAT(
      [&] {
        LayerCache(config, {nullptr, random_value_codec(rng, 32, 1, 8, 4)});
      },
      ThrowsMessage<Error>(AllOf(HasSubstr("num_blocks 4"), HasSubstr("2 KV heads"))));
}

TEST(LayerCache, GivesBackMemoryOfExactCopies) {
  Rng rng(10);
  LayerCache cache(small_config(), small_codec());
  append_random(cache, rng, 20000);
  for (int t = 0; t < 200; ++t) append_random(cache, rng, 1);
  const Index row = 2 * kChannels * 2;
  EXPECT_LT(cache.exact_store().allocated_bytes(), 2000 * row);
}

TEST(LayerCache, RefusesWhatItCannotStoreAndStaysAsItWas) {
  LayerCache cache(small_config(), small_codec());
  const Tokens good = random_tokens(100);
  append(cache, good, 0, 100);
  const Tokens before = seen(cache);
  const float inf = std::numeric_limits<float>::infinity();
  for (const float bad : {std::nanf(""), inf, -inf, 3.4e38f}) {
    for (const bool in_keys : {true, false}) {
      Tokens tokens = random_tokens(50);
      (in_keys ? tokens.keys : tokens.values)[30 * kChannels + 5] = bad;
      EXPECT_THAT(
          [&] { append(cache, tokens, 0, 50); },
          ThrowsMessage<Error>(AllOf(HasSubstr(in_keys ? "key" : "value"), HasSubstr("130"))))
          << bad;
      EXPECT_EQ(cache.length(), 100);
      EXPECT_EQ(seen(cache).keys, before.keys);
      EXPECT_EQ(seen(cache).values, before.values);
    }
  }
  const MatrixView<const float> narrow(good.keys.data(), 10, 32);
  EXPECT_THAT([&] { cache.append(narrow, narrow); },
              ThrowsMessage<Error>(AllOf(HasSubstr("32"), HasSubstr("64"))));
  EXPECT_THAT([&] { cache.append(good.key_rows(0, 10), good.value_rows(0, 9)); },
              ThrowsMessage<Error>(AllOf(HasSubstr("9"), HasSubstr("10"))));
  cache.append(good.key_rows(0, 0), good.value_rows(0, 0));
  EXPECT_EQ(cache.length(), 100);
}

TEST(LayerCache, ZeroKeysAndValuesDecodeToZero) {
  CacheConfig config = small_config();
  config.window = config.sinks = 0;
  LayerCache cache(config, small_codec());
  Tokens zeros = random_tokens(10);
  std::fill(zeros.keys.begin(), zeros.keys.end(), 0.0f);
  std::fill(zeros.values.begin(), zeros.values.end(), 0.0f);
  append(cache, zeros, 0, 10);
  EXPECT_EQ(seen(cache).keys, zeros.keys);
  EXPECT_EQ(seen(cache).values, zeros.values);
}

TEST(CacheConfig, RefusesFieldsOutOfRangeNamingThem) {
  const auto refuses = [](auto change, const char* name) {
    CacheConfig config = small_config();
    change(config);
    EXPECT_THAT([&] { LayerCache(config, {}); }, ThrowsMessage<Error>(HasSubstr(name)));
  };
  refuses([](CacheConfig& c) { c.num_kv_heads = 0; }, "num_kv_heads");
  refuses([](CacheConfig& c) { c.window = -1; }, "window");
  refuses([](CacheConfig& c) { c.sinks = -1; }, "sinks");
  refuses([](CacheConfig& c) { c.window = kMaxTokens + 1; }, "window");
  refuses([](CacheConfig& c) { c.sinks = kMaxTokens + 1; }, "sinks");
  refuses([](CacheConfig& c) { c.page_size = 60; }, "page_size");
  refuses([](CacheConfig& c) { c.page_size = 0; }, "page_size");
  refuses([](CacheConfig& c) { c.rope.theta = 0; }, "theta");
}

TEST(CacheConfig, RefusesCodecsOfOtherShapes) {
  CacheConfig config = small_config();
  config.num_kv_heads = 4;
  const LayerCodec codec = small_codec();
  EXPECT_THAT(
      [&] {
        LayerCache(config, {codec.keys, nullptr});
      },
      ThrowsMessage<Error>(AllOf(HasSubstr("2"), HasSubstr("4"))));
  EXPECT_THAT(
      [&] {
        LayerCache(config, {nullptr, codec.values});
      },
      ThrowsMessage<Error>(AllOf(HasSubstr("64"), HasSubstr("128"))));
  config = small_config();
  config.rope.pairs.layout = RopeLayout::kInterleaved;
  EXPECT_THAT([&] { LayerCache(config, {codec.keys, nullptr}); }, testing::Throws<Error>());
}

TEST(Cache, LayersHaveTheirOwnCodecs) {
  const LayerCodec codec = small_codec();
  Cache cache(small_config(), {codec, {codec.keys, nullptr}, {nullptr, codec.values}, {}});
  ASSERT_EQ(cache.num_layers(), 4);
  EXPECT_LT(cache.layer(0).bits_per_token(), cache.layer(2).bits_per_token());
  EXPECT_EQ(cache.layer(3).bits_per_token(), 2 * 16 * kChannels);
  EXPECT_THAT([&] { cache.layer(4); }, ThrowsMessage<Error>(HasSubstr("4")));
  EXPECT_THAT([&] { cache.layer(-1); }, ThrowsMessage<Error>(HasSubstr("-1")));
  EXPECT_THAT([] { Cache(small_config(), {}); }, ThrowsMessage<Error>(HasSubstr("layer")));
}

TEST(Cache, IsMadeOfLayersOfOneConfiguration) {
  CacheConfig other = small_config();
  other.window = 21;
  const LayerCache layer(small_config(), {}), wider(other, {});
  EXPECT_EQ(Cache({layer, layer}).num_layers(), 2);
  EXPECT_THAT([&] { Cache({layer, wider}); }, ThrowsMessage<Error>(HasSubstr("layers 0 and 1")));
  EXPECT_THAT([] { Cache(std::vector<LayerCache>{}); }, ThrowsMessage<Error>(HasSubstr("layer")));
}

TEST(Cache, LengthIsThatOfTheShortestLayer) {
  Rng rng(12);
  Cache cache(small_config(), {small_codec(), {}});
  append_random(cache.layer(0), rng, 50);
  EXPECT_EQ(cache.length(), 0);
  append_random(cache.layer(1), rng, 40);
  EXPECT_EQ(cache.length(), 40);
  EXPECT_THAT([&] { cache.truncate(41); }, ThrowsMessage<Error>(HasSubstr("41")));
  EXPECT_EQ(cache.layer(0).length(), 50);
  cache.truncate(30);
  EXPECT_EQ(cache.layer(0).length(), 30);
  EXPECT_EQ(cache.layer(1).length(), 30);
  Cache fork = cache.fork();
  cache.clear();
  EXPECT_EQ(cache.length(), 0);
  EXPECT_EQ(fork.length(), 30);
}

}  // namespace
}  // namespace commvq
