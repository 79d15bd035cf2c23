// What reading a saved cache takes from the heap, whatever the file claims.
#include "commvq/io/saved_cache.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "io/saved_cache_format.hpp"
#include "reference/crafted_cache.hpp"
#include "reference/example_data.hpp"
#include "reference/heap.hpp"
#include "reference/random_cache.hpp"

#if defined(COMMVQ_COUNTS_HEAP)

namespace commvq {
namespace {

using testing_support::append_random;
using testing_support::read_file;
using testing_support::repair_digests;
using testing_support::Rng;
using testing_support::TemporaryFolder;
using testing_support::write_file;

/// Bytes that `action` takes at most.
template <class Action>
std::int64_t peak_of(Action action) {
  const std::int64_t before = heap::live_bytes;
  heap::peak_bytes = before;
  action();
  return heap::peak_bytes - before;
}

class SavedCacheMemory : public testing::TestWithParam<Index> {
 protected:
  /// The smallest pages are those whose administration weighs most.
  SavedCacheMemory() {
    config_.rope.pairs.head_dim = config_.rope.pairs.rotary_dim = 8;
    config_.page_size = GetParam();
    config_.window = 16;
    KeyCodecConfig keys;
    keys.pairs = config_.rope.pairs;
    keys.group_pairs = 4;
    keys.codebook_size = 2;
    keys.num_stages = 1;
    Rng rng(1);
    codecs_ = {{testing_support::random_key_codec(rng, keys, 1),
                testing_support::random_value_codec(rng, 8, 1, 4)}};
    Cache cache(config_, codecs_);
    for (int i = 0; i < 100; ++i) append_random(cache.layer(0), rng, 100);
    save_cache(path(), cache);
  }
  std::filesystem::path path() const { return folder_.path() / "saved"; }
  std::int64_t limit() const {
    return 4 * static_cast<std::int64_t>(std::filesystem::file_size(path())) + 65536;
  }

  TemporaryFolder folder_{"saved_cache_memory"};
  CacheConfig config_;
  std::vector<LayerCodec> codecs_;
};

TEST_P(SavedCacheMemory, ReadingTakesAStatedMultipleOfTheFile) {
  const Cache other(config_, codecs_);  // keeps the codecs' tables
  const std::int64_t peak =
      peak_of([&] { EXPECT_EQ(load_cache(path(), config_, codecs_).length(), 10000); });
  RecordProperty("peak_bytes", std::to_string(peak));
  RecordProperty("file_bytes", std::to_string(limit() / 4 - 16384));
  EXPECT_LE(peak, limit());
  EXPECT_GE(peak, limit() / 8);  // it is counted
}

TEST_P(SavedCacheMemory, AFileThatClaimsMoreTakesNoMore) {
  const Cache other(config_, codecs_);
  const std::string good = read_file(path());
  for (std::size_t at = 8; at < sizeof(detail::CachePreamble) + 96 + 88; ++at)
    for (const char byte : {'\x7f', '\xff'}) {
      // With digests that fit, so that its fields are believed.
      std::string bytes = good;
      bytes[at] = byte;
      repair_digests({reinterpret_cast<std::uint8_t*>(bytes.data()), bytes.size()});
      write_file(path(), bytes);
      EXPECT_LE(peak_of([&] {
                  try {
                    load_cache(path(), config_, codecs_);
                  } catch (const Error&) {
                  }
                }),
                limit())
          << at;
    }
}

INSTANTIATE_TEST_SUITE_P(PageSizes, SavedCacheMemory, testing::Values(8, 64));

}  // namespace
}  // namespace commvq

#else

TEST(SavedCacheMemory, ReadingTakesAStatedMultipleOfTheFile) {
  GTEST_SKIP() << "the heap is counted with glibc and without sanitizers only";
}

#endif
