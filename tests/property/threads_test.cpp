// Many threads with one set of codebooks: each has caches of its own and gets what it would get
// alone. Run it under ThreadSanitizer as docs/reliability.md says.
#include <functional>
#include <thread>

#include "commvq/attention/attention.hpp"
#include "commvq/io/saved_cache.hpp"

#include <gtest/gtest.h>

#include "reference/example_data.hpp"
#include "reference/random_cache.hpp"

namespace commvq {
namespace {

using testing_support::append_random;
using testing_support::normal_floats;
using testing_support::random_key_codec;
using testing_support::random_value_codec;
using testing_support::Rng;
using testing_support::TemporaryFolder;

constexpr int kThreads = 6;
constexpr Index kChannels = 32;

CacheConfig small_config() {
  CacheConfig config;
  config.rope.pairs.head_dim = config.rope.pairs.rotary_dim = 16;
  config.num_kv_heads = 2;
  config.window = 16;
  config.page_size = 16;
  return config;
}

LayerCodec small_codec() {
  Rng rng(1);
  KeyCodecConfig keys = KeyCodecConfig::commvq_2bit(small_config().rope.pairs);
  keys.codebook_size = 8;
  return {random_key_codec(rng, keys, 2), random_value_codec(rng, kChannels, 1, 16)};
}

/// Runs `work(0)`, `work(1)`, ... at the same time.
void on_threads(const std::function<void(int)>& work) {
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(work, i);
  for (std::thread& thread : threads) thread.join();
}

std::vector<float> attend_once(const LayerCache& cache, std::uint64_t seed) {
  Rng rng(seed);
  const std::vector<float> query = normal_floats(rng, kChannels);
  std::vector<float> output(query.size());
  attend(cache, as_matrix(query, 1, kChannels), {}, as_matrix(output, 1, kChannels));
  return output;
}

/// All outputs of a sequence that grows from `cache` on.
std::vector<std::vector<float>> grow(LayerCache cache, int sequence) {
  Rng rng(static_cast<std::uint64_t>(100 + sequence));
  std::vector<std::vector<float>> outputs;
  for (int step = 0; step < 20; ++step) {
    append_random(cache, rng, step % 5 == 0 ? 40 : 1);
    outputs.push_back(attend_once(cache, static_cast<std::uint64_t>(step)));
    if (step % 7 == 6) cache.truncate(cache.length() - 3);
  }
  return outputs;
}

TEST(Threads, ShareCodebooks) {
  const LayerCodec codec = small_codec();
  std::vector<std::vector<std::vector<float>>> alone, together(kThreads);
  for (int i = 0; i < kThreads; ++i) alone.push_back(grow(LayerCache(small_config(), codec), i));
  on_threads([&](int i) {
    together[static_cast<std::size_t>(i)] = grow(LayerCache(small_config(), codec), i);
  });
  EXPECT_EQ(together, alone);
}

// Nobody holds the tables when the threads begin: they make them, once.
TEST(Threads, MakeTablesOfNewCodebooksAtTheSameTime) {
  const LayerCodec codec = small_codec();
  std::vector<std::shared_ptr<const KeyTables>> tables(kThreads);
  on_threads([&](int i) { tables[static_cast<std::size_t>(i)] = KeyTables::of(codec.keys); });
  for (const auto& each : tables) EXPECT_EQ(each, tables[0]);
}

TEST(Threads, EncodeWithTheSameCodecs) {
  const LayerCodec codec = small_codec();
  constexpr Index kTokens = 200;
  Rng rng(2);
  const std::vector<float> numbers = normal_floats(rng, kTokens * kChannels);
  const auto rows = as_matrix(numbers, kTokens, kChannels);
  const Index num_codes = 2 * codec.keys->config().num_codes();
  struct Codes {
    std::vector<std::uint16_t> keys, norms, scales;
    std::vector<std::uint8_t> values;
    bool operator==(const Codes&) const = default;
  };
  std::vector<Codes> results(kThreads + 1);
  const auto encode = [&](int i) {
    Codes& codes = results[static_cast<std::size_t>(i)];
    codes.keys.resize(static_cast<std::size_t>(kTokens * num_codes));
    codes.norms.resize(static_cast<std::size_t>(kTokens * codec.keys->num_norms()));
    codes.values.resize(static_cast<std::size_t>(kTokens * codec.values->code_bytes()));
    codes.scales.resize(static_cast<std::size_t>(kTokens));
    codec.keys->encode(rows, as_matrix(codes.keys, kTokens, num_codes), codes.norms.data());
    codec.values->encode(rows, as_matrix(codes.values, kTokens, codec.values->code_bytes()),
                         codes.scales.data());
  };
  encode(kThreads);
  on_threads(encode);
  for (int i = 0; i < kThreads; ++i)
    EXPECT_EQ(results[static_cast<std::size_t>(i)], results.back()) << i;
}

// Forks of one prompt: the thread that gives a page up last leaves it to another one to write.
TEST(Threads, GrowForksOfOnePrompt) {
  Rng rng(3);
  LayerCache prompt(small_config(), small_codec());
  append_random(prompt, rng, 200);
  std::vector<std::vector<std::vector<float>>> alone, together(kThreads);
  for (int i = 0; i < kThreads; ++i) alone.push_back(grow(prompt.fork(), i));
  std::vector<LayerCache> forks(kThreads, prompt);
  prompt.clear();
  on_threads([&](int i) {
    const auto at = static_cast<std::size_t>(i);
    LayerCache own = std::move(forks[at]);
    forks[at] = LayerCache(small_config(), {});
    together[at] = grow(std::move(own), i);
  });
  EXPECT_EQ(together, alone);
}

TEST(Threads, SaveAndLoadSequences) {
  const LayerCodec codec = small_codec();
  const TemporaryFolder folder("threads");
  Rng rng(4);
  Cache prompt(small_config(), {codec});
  append_random(prompt.layer(0), rng, 100);
  save_cache(folder.path() / "prompt", prompt);
  const std::vector<float> expected = attend_once(prompt.layer(0), 5);
  std::vector<std::vector<float>> results(kThreads);
  // All write the same file: whoever is last, it is whole.
  on_threads([&](int i) {
    for (int round = 0; round < 5; ++round) {
      const Cache own = load_cache(folder.path() / "prompt", small_config(), {codec});
      save_cache(folder.path() / "prompt", own);
      results[static_cast<std::size_t>(i)] = attend_once(own.layer(0), 5);
    }
  });
  for (const std::vector<float>& result : results) EXPECT_EQ(result, expected);
}

}  // namespace
}  // namespace commvq
