// Whatever allocation fails, in whatever thread, the caller gets std::bad_alloc and the process
// goes on.
#include <functional>
#include <vector>

#include "commvq/attention/attention.hpp"
#include "commvq/core/parallel_errors.hpp"
#include "commvq/learner/key_learner.hpp"
#include "commvq/learner/value_trainer.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <omp.h>

#include "reference/heap.hpp"
#include "reference/random_cache.hpp"

namespace commvq {
namespace {

using testing_support::normal_floats;
using testing_support::random_key_codec;
using testing_support::random_value_codec;
using testing_support::Rng;

TEST(ParallelErrors, BringsTheExceptionOutOfTheRegion) {
  ParallelErrors errors;
  std::vector<int> done(1000);
#pragma omp parallel for num_threads(4)
  for (int i = 0; i < 1000; ++i)
    errors.guard([&] {
      require(i != 500, "item ", i, " is bad");
      done[static_cast<std::size_t>(i)] = 1;
    });
  EXPECT_EQ(done[500], 0);
  EXPECT_THAT([&] { errors.rethrow(); }, testing::ThrowsMessage<Error>("item 500 is bad"));
}

TEST(ParallelErrors, LeavesOutWhatHasNotBegun) {
  ParallelErrors errors;
  int runs = 0;
  errors.guard([&] { ++runs; });
  errors.rethrow();
  errors.guard([] { throw 1; });
  errors.guard([&] { ++runs; });
  EXPECT_EQ(runs, 1);
  EXPECT_THROW(errors.rethrow(), int);
}

#if defined(COMMVQ_COUNTS_HEAP)

/// Runs `action` again and again, letting its first allocation fail, its second and so on (after
/// the first dozens every few), until none is left. Returns how often it threw.
int fail_every_allocation(const std::function<void()>& action) {
  action();  // the threads' own memory
  int thrown = 0;
  for (std::int64_t n = 0;; n += 1 + n / 20) {
    heap::allocations_until_failure = n;
    try {
      action();
    } catch (const std::bad_alloc&) {
      ++thrown;
    }
    const bool was_reached = heap::allocations_until_failure < 0;
    heap::allocations_until_failure = -1;
    if (!was_reached) return thrown;
  }
}

constexpr Index kChannels = 32;

class OutOfMemory : public testing::Test {
 protected:
  OutOfMemory() : threads_(omp_get_max_threads()) {
    omp_set_num_threads(3);
    config_.rope.pairs.head_dim = config_.rope.pairs.rotary_dim = 16;
    config_.num_kv_heads = 2;
    config_.window = 16;
    KeyCodecConfig keys = KeyCodecConfig::commvq_2bit(config_.rope.pairs);
    keys.codebook_size = 8;
    codec_ = {random_key_codec(rng_, keys, 2), random_value_codec(rng_, kChannels, 1, 64)};
    keys_ = normal_floats(rng_, kTokens * kChannels);
    values_ = normal_floats(rng_, kTokens * kChannels);
  }
  ~OutOfMemory() override { omp_set_num_threads(threads_); }

  static constexpr Index kTokens = 400;
  MatrixView<const float> keys() const { return as_matrix(keys_, kTokens, kChannels); }
  MatrixView<const float> values() const { return as_matrix(values_, kTokens, kChannels); }

  Rng rng_{1};
  CacheConfig config_;
  LayerCodec codec_;
  std::vector<float> keys_, values_;

 private:
  int threads_;
};

TEST_F(OutOfMemory, Encoders) {
  const KeyCodec& key_codec = *codec_.keys;
  const Index num_codes = key_codec.num_kv_heads() * key_codec.config().num_codes();
  std::vector<std::uint16_t> codes(static_cast<std::size_t>(kTokens * num_codes));
  std::vector<std::uint16_t> norms(static_cast<std::size_t>(kTokens * key_codec.num_norms()));
  EXPECT_GT(fail_every_allocation([&] {
              key_codec.encode(keys(), as_matrix(codes, kTokens, num_codes), norms.data());
            }),
            100);
  const ValueCodec& value_codec = *codec_.values;
  const Index code_bytes = value_codec.code_bytes();
  std::vector<std::uint8_t> bits(static_cast<std::size_t>(kTokens * code_bytes));
  std::vector<std::uint16_t> scales(static_cast<std::size_t>(kTokens));
  EXPECT_GT(fail_every_allocation([&] {
              value_codec.encode(values(), as_matrix(bits, kTokens, code_bytes), scales.data());
            }),
            5);
  std::vector<float> decoded(values_.size());
  EXPECT_GT(fail_every_allocation([&] {
              value_codec.decode(as_matrix(bits, kTokens, code_bytes), scales.data(),
                                 as_matrix(decoded, kTokens, kChannels));
            }),
            0);
}

TEST_F(OutOfMemory, Attention) {
  LayerCache cache(config_, codec_);
  for (int i = 0; i < 5; ++i) cache.append(keys(), values());
  const std::vector<float> queries = normal_floats(rng_, 40 * 2 * kChannels);
  std::vector<float> output(queries.size());
  EXPECT_GT(fail_every_allocation([&] {
              attend(cache, as_matrix(queries, 40, 2 * kChannels), {},
                     as_matrix(output, 40, 2 * kChannels));
            }),
            20);
}

TEST_F(OutOfMemory, AppendLeavesTheCacheAsItWas) {
  LayerCache cache(config_, codec_);
  cache.append(keys(), values());
  const LayerExtent extent = cache.extent();
  std::vector<float> before(keys_.size()), before_values(keys_.size());
  cache.decode_tokens(kTokens - 1, 0, as_matrix(before, kTokens, kChannels),
                      as_matrix(before_values, kTokens, kChannels));
  std::vector<float> after(before.size()), after_values(before.size());
  LayerCache grown = cache.fork();
  EXPECT_GT(fail_every_allocation([&] {
              grown = cache.fork();
              try {
                grown.append(keys(), values());
              } catch (const std::bad_alloc&) {
                heap::allocations_until_failure = -1;
                EXPECT_EQ(grown.extent(), extent);
                grown.decode_tokens(kTokens - 1, 0, as_matrix(after, kTokens, kChannels),
                                    as_matrix(after_values, kTokens, kChannels));
                EXPECT_EQ(after, before);
                EXPECT_EQ(after_values, before_values);
                throw;
              }
            }),
            100);
  EXPECT_EQ(grown.length(), 2 * kTokens);
}

TEST_F(OutOfMemory, Learners) {
  KeyLearnerOptions key_options =
      KeyLearnerOptions::commvq(KeyCodecConfig::commvq_1bit(config_.rope.pairs));
  key_options.codec.codebook_size = 8;
  key_options.max_steps = 1;
  key_options.refinement.rounds = 1;
  EXPECT_GT(fail_every_allocation([&] { learn_key_codec(keys(), key_options); }), 50);
  ValueTrainerOptions value_options = ValueTrainerOptions::commvq(codec_.values->config());
  value_options.steps = 3;
  value_options.refinement.rounds = 1;
  EXPECT_GT(fail_every_allocation([&] { train_value_codec(values(), value_options); }), 50);
}

#endif

}  // namespace
}  // namespace commvq
