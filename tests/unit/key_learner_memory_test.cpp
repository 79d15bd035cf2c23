// What learn_key_codec takes from the heap, counted by functions that stand before glibc's.
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <string>
#include <vector>

#include "commvq/learner/key_learner.hpp"

#include <gtest/gtest.h>

#include "reference/instrumented.hpp"
#include "reference/random_cache.hpp"

#if defined(__GLIBC__) && !COMMVQ_INSTRUMENTED

#include <malloc.h>

namespace {

std::atomic<std::int64_t> live_bytes{0};
std::atomic<std::int64_t> peak_bytes{0};

void* count(void* block) {
  const std::int64_t live = live_bytes += static_cast<std::int64_t>(malloc_usable_size(block));
  std::int64_t peak = peak_bytes;
  while (peak < live && !peak_bytes.compare_exchange_weak(peak, live)) {
  }
  return block;
}
void discount(void* block) {
  live_bytes -= static_cast<std::int64_t>(malloc_usable_size(block));
}

}  // namespace

extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
void __libc_free(void*);

void* malloc(std::size_t size) {
  return count(__libc_malloc(size));
}
void* calloc(std::size_t number, std::size_t size) {
  return count(__libc_calloc(number, size));
}
void* realloc(void* block, std::size_t size) {
  discount(block);
  return count(__libc_realloc(block, size));
}
void* memalign(std::size_t alignment, std::size_t size) {
  return count(__libc_memalign(alignment, size));
}
void* aligned_alloc(std::size_t alignment, std::size_t size) {
  return memalign(alignment, size);
}
int posix_memalign(void** block, std::size_t alignment, std::size_t size) {
  *block = memalign(alignment, size);
  return *block == nullptr ? ENOMEM : 0;
}
void free(void* block) {
  discount(block);
  __libc_free(block);
}
}

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
  const std::int64_t before = live_bytes;
  peak_bytes = before;
  learn_key_codec(as_matrix(keys, tokens, kChannels), options);
  return peak_bytes - before;
}

TEST(KeyLearnerMemory, CountsWhatIsAllocated) {
  const std::int64_t before = live_bytes;
  const std::vector<char> block(100000);
  EXPECT_GE(live_bytes - before, 100000);
  EXPECT_GE(peak_bytes, before + 100000);
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
