// The same input gives the same bytes: again, at another address, with another number of threads.
// docs/reliability.md lists the functions and which of these tests speaks for each.
#include <functional>

#include "commvq/attention/attention.hpp"
#include "commvq/io/saved_cache.hpp"
#include "commvq/learner/key_learner.hpp"
#include "commvq/learner/query_statistics.hpp"
#include "commvq/learner/value_trainer.hpp"

#include <gtest/gtest.h>
#include <omp.h>

#include "reference/example_data.hpp"
#include "reference/instrumented.hpp"
#include "reference/random_cache.hpp"

namespace commvq {
namespace {

using testing_support::normal_floats;
using testing_support::random_key_codec;
using testing_support::random_value_codec;
using testing_support::read_file;
using testing_support::Rng;
using testing_support::TemporaryFolder;

constexpr Index kTokens = 300;
constexpr Index kChannels = 64;  // two KV heads of 32

/// Random rows whose first number lies `offset` floats beyond where memory begins: sums that are
/// cut where a vector's alignment begins would differ.
class Rows {
 public:
  Rows(std::uint64_t seed, Index offset) : offset_(offset), numbers_(offset + kTokens * kChannels) {
    Rng rng(seed);
    const std::vector<float> random = normal_floats(rng, kTokens * kChannels);
    std::copy(random.begin(), random.end(), numbers_.begin() + offset);
  }
  MatrixView<const float> view() const { return {numbers_.data() + offset_, kTokens, kChannels}; }

 private:
  Index offset_;
  std::vector<float> numbers_;
};

CacheConfig small_config() {
  CacheConfig config;
  config.rope.pairs.head_dim = config.rope.pairs.rotary_dim = 32;
  config.num_kv_heads = 2;
  config.window = 16;
  return config;
}

LayerCodec small_codec(bool polish) {
  Rng rng(1);
  KeyCodecConfig keys = KeyCodecConfig::commvq_2bit(small_config().rope.pairs);
  keys.codebook_size = 16;
  const auto values = random_value_codec(rng, kChannels, 1, 64, polish ? 2 : 1);
  ValueCodecConfig config = values->config();
  config.polish_sweeps = polish ? 4 : 0;
  return {random_key_codec(rng, keys, 2),
          std::make_shared<const ValueCodec>(config, values->weights())};
}

class Determinism : public testing::Test {
 protected:
  ~Determinism() override { omp_set_num_threads(threads_); }

  /// `bytes_of(offset)` computes from input at that offset. With a sanitizer two and three threads.
  void expect_same(const std::function<std::string(Index)>& bytes_of) {
    omp_set_num_threads(1);
    const std::string expected = bytes_of(0);
    ASSERT_FALSE(expected.empty());
    for (const int threads : {2, 3, 1, 8}) {
      if (threads == 1 && testing_support::repeats(2, 1) == 1) break;
      for (const Index offset : {0, 1, 7}) {
        omp_set_num_threads(threads);
        EXPECT_TRUE(bytes_of(offset) == expected) << threads << " threads, offset " << offset;
      }
    }
  }
  template <class T>
  static std::string bytes_in(const std::vector<T>& values) {
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
  }

 private:
  int threads_ = omp_get_max_threads();
};

TEST_F(Determinism, KeyCodec) {
  const LayerCodec codec = small_codec(false);
  expect_same([&](Index offset) {
    const Index num_codes = 2 * codec.keys->config().num_codes();
    std::vector<std::uint16_t> codes(static_cast<std::size_t>(kTokens * num_codes));
    std::vector<std::uint16_t> norms(static_cast<std::size_t>(kTokens * codec.keys->num_norms()));
    std::vector<float> decoded(kTokens * kChannels);
    const auto rows = as_matrix(codes, kTokens, num_codes);
    codec.keys->encode(Rows(2, offset).view(), rows, norms.data());
    codec.keys->decode(rows, norms.data(), as_matrix(decoded, kTokens, kChannels));
    return bytes_in(codes) + bytes_in(norms) + bytes_in(decoded);
  });
}

TEST_F(Determinism, ValueCodec) {
  for (const bool polish : {false, true}) {
    const LayerCodec codec = small_codec(polish);
    expect_same([&](Index offset) {
      const Index code_bytes = codec.values->code_bytes();
      std::vector<std::uint8_t> codes(static_cast<std::size_t>(kTokens * code_bytes));
      std::vector<std::uint16_t> scales(
          static_cast<std::size_t>(kTokens * codec.values->config().num_blocks));
      std::vector<float> decoded(kTokens * kChannels);
      const auto rows = as_matrix(codes, kTokens, code_bytes);
      codec.values->encode(Rows(3, offset).view(), rows, scales.data());
      codec.values->decode(rows, scales.data(), as_matrix(decoded, kTokens, kChannels));
      return bytes_in(codes) + bytes_in(scales) + bytes_in(decoded);
    });
  }
}

TEST_F(Determinism, AppendAttendAndSave) {
  const LayerCodec codec = small_codec(true);
  const TemporaryFolder folder("determinism");
  expect_same([&](Index offset) {
    Cache cache(small_config(), {codec});
    for (int i = 0; i < 5; ++i)
      cache.layer(0).append(Rows(4, offset).view(), Rows(5, offset).view());
    save_cache(folder.path() / "cache", cache);
    const Rows queries(6, offset);
    std::vector<float> output(7 * kChannels), lse(7 * 2);
    attend(cache.layer(0), queries.view().middle_rows(0, 7), {}, as_matrix(output, 7, kChannels),
           lse.data());
    return read_file(folder.path() / "cache") + bytes_in(output) + bytes_in(lse);
  });
}

TEST_F(Determinism, QueryStatistics) {
  expect_same([&](Index offset) {
    QueryStatistics statistics(small_config().rope.pairs, 2);
    statistics.add(Rows(7, offset).view());
    return bytes_in(statistics.pair_weights());
  });
}

TEST_F(Determinism, KeyLearner) {
  const PairLayout pairs = small_config().rope.pairs;
  for (auto options : {KeyLearnerOptions::paper(KeyCodecConfig::paper_1bit(pairs)),
                       KeyLearnerOptions::commvq(KeyCodecConfig::commvq_1bit(pairs))}) {
    options.codec.codebook_size = 16;
    options.max_steps = 3;
    expect_same([&](Index offset) {
      const KeyCodec codec = learn_key_codec(Rows(8, offset).view(), options);
      return bytes_in(codec.codebook(0).rows) + bytes_in(codec.codebook(1).rows);
    });
  }
}

TEST_F(Determinism, ValueTrainer) {
  for (auto options : {ValueTrainerOptions::paper(ValueCodecConfig::paper_1bit(kChannels)),
                       ValueTrainerOptions::commvq(ValueCodecConfig::commvq_1bit(kChannels)),
                       ValueTrainerOptions::commvq(ValueCodecConfig::speed_1bit(kChannels, 2))}) {
    options.steps = 4;
    expect_same([&](Index offset) {
      const ValueCodec codec = train_value_codec(Rows(9, offset).view(), options);
      const ValueCodecWeights& w = codec.weights();
      std::string bytes;
      for (const auto* weight : {&w.norm_gain, &w.norm_bias, &w.hidden_weight, &w.hidden_bias,
                                 &w.output_weight, &w.output_bias, &w.decoder})
        bytes += bytes_in(*weight);
      return bytes;
    });
  }
}

TEST_F(Determinism, CodebookFile) {
  const TemporaryFolder folder("determinism");
  const ModelCodecs codecs{small_config().rope, 2, {small_codec(false), {}}, "model", "test"};
  expect_same([&](Index) {
    save_codecs(folder.path() / "codecs", codecs);
    return read_file(folder.path() / "codecs");
  });
}

}  // namespace
}  // namespace commvq
