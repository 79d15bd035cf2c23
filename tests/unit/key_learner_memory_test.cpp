// What learn_key_codec takes from the heap.
#include <string>
#include <vector>

#include "commvq/learner/key_learner.hpp"

#include <gtest/gtest.h>

#include "reference/heap.hpp"
#include "reference/random_cache.hpp"

#if defined(COMMVQ_COUNTS_HEAP)

namespace commvq {
namespace {

constexpr int kHeadDim = 64;
constexpr Index kChannels = 2 * kHeadDim;

/// Bytes that learning from `tokens` keys takes at most, beyond the keys.
std::int64_t peak_of(Index tokens, int max_tokens) {
  testing_support::Rng rng(3);
  const std::vector<float> keys = testing_support::normal_floats(rng, tokens * kChannels, 1.0);
  KeyLearnerOptions options;
  options.codec.pairs = {kHeadDim, kHeadDim, RopeLayout::kHalfSplit};
  options.codec.group_pairs = kHeadDim / 2;
  options.codec.codebook_size = 16;
  options.codec.num_stages = 4;
  options.codec.tied = false;
  options.max_steps = 2;
  options.max_tokens = max_tokens;
  options.batch_tokens = 512;
  options.refinement.rounds = 1;
  options.refinement.beam_width = 2;
  const std::int64_t before = heap::live_bytes;
  heap::peak_bytes = before;
  learn_key_codec(as_matrix(keys, tokens, kChannels), options);
  return heap::peak_bytes - before;
}

TEST(KeyLearnerMemory, CountsWhatIsAllocated) {
  const std::int64_t before = heap::live_bytes;
  const std::vector<char> block(100000);
  EXPECT_GE(heap::live_bytes - before, 100000);
  EXPECT_GE(heap::peak_bytes, before + 100000);
}

TEST(KeyLearnerMemory, AKeyTakesLessThanACopyOfIt) {
  peak_of(4096, 1 << 20);  // the threads' own memory
  const std::int64_t few = peak_of(4096, 1 << 20);
  const std::int64_t many = peak_of(16384, 1 << 20);
  const double per_token = static_cast<double>(many - few) / (16384 - 4096);
  RecordProperty("bytes_per_token", std::to_string(per_token));
  EXPECT_LE(per_token, 90);  // one head of a key has 256 bytes
}

TEST(KeyLearnerMemory, KeysThatAreNotLearntFromTakeNone) {
  peak_of(4096, 2048);
  const std::int64_t few = peak_of(4096, 2048);
  const std::int64_t many = peak_of(16384, 2048);
  EXPECT_LE(many - few, few / 10);
}

}  // namespace
}  // namespace commvq

#else

TEST(KeyLearnerMemory, AKeyTakesLessThanACopyOfIt) {
  GTEST_SKIP() << "the heap is counted with glibc and without sanitizers only";
}

#endif
