#include "commvq/io/saved_cache.hpp"

#include <cstring>
#include <functional>

#include "commvq/attention/attention.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include "io/saved_cache_format.hpp"
#include "reference/crafted_cache.hpp"
#include "reference/example_data.hpp"
#include "reference/faulty_files.hpp"
#include "reference/instrumented.hpp"
#include "reference/small_cache.hpp"

namespace commvq {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;
using testing_support::append_random;
using testing_support::FaultyFiles;
using testing_support::MemoryFile;
using testing_support::normal_floats;
using testing_support::random_cache;
using testing_support::random_value_codec;
using testing_support::read_file;
using testing_support::Rng;
using testing_support::small_codec;
using testing_support::small_codecs;
using testing_support::small_config;
using testing_support::TemporaryFolder;
using testing_support::write_file;

constexpr Index kChannels = 8;  // two heads of 4
/// Tests of every byte or bit take so many at a time.
constexpr std::size_t kStep = testing_support::repeats(1, 13);

std::vector<float> attend_with(const LayerCache& cache, const std::vector<float>& queries) {
  std::vector<float> output(queries.size());
  const Index rows = static_cast<Index>(queries.size()) / kChannels;
  attend(cache, as_matrix(queries, rows, kChannels), {}, as_matrix(output, rows, kChannels));
  return output;
}

std::vector<std::vector<std::uint8_t>> exact_bytes(const LayerCache& cache) {
  const auto copy = [](auto bytes) {
    return std::vector<std::uint8_t>(bytes.begin(), bytes.end());
  };
  return {copy(cache.sink_store().bytes()), copy(cache.exact_store().bytes())};
}

/// Bytes of every code, norm and exact copy, and bits of attention.
void expect_equal(const LayerCache& a, const LayerCache& b) {
  ASSERT_EQ(a.extent(), b.extent());
  EXPECT_EQ(exact_bytes(a), exact_bytes(b));
  ASSERT_EQ(a.pages().size(), b.pages().size());
  for (std::size_t i = 0; i < a.pages().size(); ++i) EXPECT_EQ(*a.pages()[i], *b.pages()[i]) << i;
  if (a.length() == 0) return;
  Rng rng(9);
  const std::vector<float> queries = normal_floats(rng, std::min(a.length(), Index{2}) * kChannels);
  EXPECT_EQ(attend_with(a, queries), attend_with(b, queries));
}

void expect_equal(const Cache& a, const Cache& b) {
  ASSERT_EQ(a.num_layers(), b.num_layers());
  for (int i = 0; i < a.num_layers(); ++i) expect_equal(a.layer(i), b.layer(i));
}

std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "(no error)";
}

class SavedCache : public testing::Test {
 protected:
  fs::path file() const { return folder_.path() / "prompt.cache"; }
  Cache load(const CacheConfig& config = small_config()) const {
    return load_cache(file(), config, codecs_, "tag");
  }
  std::string load_error() const {
    return error_of([&] { load(); });
  }
  std::size_t files_in_folder() const {
    return static_cast<std::size_t>(
        std::distance(fs::directory_iterator(folder_.path()), fs::directory_iterator()));
  }

  TemporaryFolder folder_{"saved_cache"};
  std::vector<LayerCodec> codecs_ = small_codecs();
};

TEST_F(SavedCache, RestoresEveryByteAndBit) {
  for (const FloatType type : {FloatType::kBf16, FloatType::kFp16, FloatType::kFp32})
    for (const Index length : {0, 1, 2, 4, 5, 6, 40, 41, 70, 200}) {
      SCOPED_TRACE(testing::Message() << name_of(type) << ", " << length << " tokens");
      CacheConfig config = small_config();
      config.exact_type = type;
      Cache cache = random_cache(config, length, 3);
      save_cache(file(), cache, "tag");
      Cache restored = load(config);
      expect_equal(cache, restored);
      // And they stay equal.
      Rng rng(4), same(4);
      for (int i = 0; i < cache.num_layers(); ++i) {
        append_random(cache.layer(i), rng, 50);
        append_random(restored.layer(i), same, 50);
      }
      expect_equal(cache, restored);
    }
}

TEST_F(SavedCache, RestoresLayersOfDifferentLengthsAndTruncatedForks) {
  Cache cache = random_cache(small_config(), 60, 5);
  Rng rng(6);
  append_random(cache.layer(1), rng, 1);
  cache.layer(2).truncate(33);
  cache.layer(3).truncate(0);
  const Cache fork = cache.fork();
  append_random(cache.layer(0), rng, 100);
  save_cache(file(), fork, "tag");
  const Cache restored = load();
  for (int i = 0; i < fork.num_layers(); ++i) {
    EXPECT_EQ(restored.layer(i).extent(), fork.layer(i).extent());
    EXPECT_EQ(restored.layer(i).first_query_position(), fork.layer(i).first_query_position());
    if (fork.layer(i).length() == 0) continue;
    const std::vector<float> query = normal_floats(rng, kChannels);
    EXPECT_EQ(attend_with(restored.layer(i), query), attend_with(fork.layer(i), query));
  }
}

TEST_F(SavedCache, RestoresBlocksOfValues) {
  Rng rng(5);
  CacheConfig config = small_config();
  config.rope.pairs.head_dim = config.rope.pairs.rotary_dim = 8;
  const LayerCodec codec{nullptr, random_value_codec(rng, 16, 1, 4, 2)};
  Cache cache(config, {codec});
  append_random(cache.layer(0), rng, 30);
  save_cache(file(), cache, "tag");
  const Cache restored = load_cache(file(), config, {codec}, "tag");
  const LayerCache &before = cache.layer(0), &after = restored.layer(0);
  ASSERT_EQ(before.pages().size(), after.pages().size());
  EXPECT_EQ(*before.pages()[0], *after.pages()[0]);
  const std::vector<float> query = normal_floats(rng, 16);
  std::vector<float> output(16), again(16);
  attend(before, as_matrix(query, 1, 16), {}, as_matrix(output, 1, 16));
  attend(after, as_matrix(query, 1, 16), {}, as_matrix(again, 1, 16));
  EXPECT_EQ(output, again);
  // Every block's scale is looked at.
  const auto page = std::make_shared<Page>(*before.pages()[0]);
  const std::uint16_t infinity = 0x7f80;
  std::memcpy(page->data() + before.page_layout().value_scale(2, 1), &infinity, 2);
  std::vector<PagePtr> pages = before.pages();
  pages[0] = page;
  EXPECT_THAT(error_of([&] {
                LayerCache(config, codec, before.extent(), before.sink_store(),
                           before.exact_store(), pages);
              }),
              HasSubstr("token 3 is inf"));
}

TEST_F(SavedCache, CodebooksFromAFileAreTheSameCodebooks) {
  const Cache cache = random_cache(small_config(), 50, 7);
  save_cache(file(), cache, "tag");
  ModelCodecs codecs{small_config().rope, 2, codecs_, "model", ""};
  save_codecs(folder_.path() / "codecs", codecs);
  expect_equal(
      load_cache(file(), small_config(), load_codecs(folder_.path() / "codecs").layers, "tag"),
      cache);
}

TEST_F(SavedCache, EqualCachesGiveEqualFiles) {
  save_cache(file(), random_cache(small_config(), 50, 8), "tag");
  const std::string bytes = read_file(file());
  save_cache(file(), random_cache(small_config(), 50, 8), "tag");
  EXPECT_EQ(read_file(file()), bytes);
  save_cache(file(), load(), "tag");
  EXPECT_EQ(read_file(file()), bytes);
}

TEST_F(SavedCache, HoldsNothingOfTruncatedTokens) {
  std::vector<std::string> files;
  for (const std::uint64_t seed : {1, 2}) {
    Cache cache = random_cache(small_config(), 30, 9);
    Rng rng(seed);
    for (int i = 0; i < cache.num_layers(); ++i) append_random(cache.layer(i), rng, 6);
    cache.truncate(21);
    save_cache(file(), cache, "tag");
    files.push_back(read_file(file()));
  }
  EXPECT_EQ(files[0], files[1]);
}

TEST_F(SavedCache, BelongsToItsOwner) {
  save_cache(file(), random_cache(small_config(), 5, 10), "tag");
  struct stat status {};
  ASSERT_EQ(::stat(file().c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0600u);
}

TEST_F(SavedCache, EveryFlippedBitIsAnError) {
  const Cache cache = random_cache(small_config(), 20, 11);
  save_cache(file(), cache, "tag");
  MemoryFile memory;
  memory.bytes = read_file(file());
  const auto load_memory = [&] {
    return detail::load_cache(file(), small_config(), codecs_, "tag", memory);
  };
  expect_equal(load_memory(), cache);
  for (std::size_t i = 0; i < 8 * memory.bytes.size(); i += kStep) {
    char& byte = memory.bytes[i / 8];
    byte = static_cast<char>(byte ^ (1 << i % 8));
    ASSERT_THAT(error_of(load_memory), HasSubstr(file().string()))
        << "bit " << i % 8 << " of byte " << i / 8;
    byte = static_cast<char>(byte ^ (1 << i % 8));
  }
  expect_equal(load_memory(), cache);
}

TEST_F(SavedCache, EveryTruncationIsAnError) {
  const Cache cache = random_cache(small_config(), 20, 12);
  save_cache(file(), cache, "tag");
  const std::string bytes = read_file(file());
  MemoryFile memory;
  const auto error_with = [&](const std::string& changed) {
    memory.bytes = changed;
    return error_of([&] { detail::load_cache(file(), small_config(), codecs_, "tag", memory); });
  };
  EXPECT_EQ(error_with(bytes), "(no error)");
  for (std::size_t size = 0; size < bytes.size(); ++size)
    ASSERT_THAT(error_with(bytes.substr(0, size)),
                HasSubstr(size < sizeof(detail::CachePreamble) ? "too few" : "cut short"));
  EXPECT_THAT(error_with(bytes + '\0'),
              AllOf(HasSubstr(std::to_string(bytes.size())), HasSubstr("changed")));
  write_file(file(), bytes.substr(0, bytes.size() / 2));
  EXPECT_THAT(load_error(), HasSubstr("cut short"));
}

TEST_F(SavedCache, NamesWhatIsWrongWithAFile) {
  EXPECT_THAT(load_error(), HasSubstr("No such file"));
  EXPECT_THAT(error_of([&] { load_cache(folder_.path(), small_config(), codecs_); }),
              HasSubstr("not a regular file"));
  write_file(file(), std::string(1000, 'x'));
  EXPECT_THAT(load_error(), HasSubstr("not a saved cache"));
  save_cache(file(), random_cache(small_config(), 20, 13), "tag");
  std::string bytes = read_file(file());
  bytes[8] = 2;
  write_file(file(), bytes);
  EXPECT_THAT(load_error(), AllOf(HasSubstr("version 2"), HasSubstr("reads version 1")));
  bytes[8] = 1;
  bytes[60] ^= 1;
  write_file(file(), bytes);
  EXPECT_THAT(load_error(), HasSubstr("checksum of its header"));
  bytes[60] ^= 1;
  bytes.back() ^= 1;
  write_file(file(), bytes);
  EXPECT_THAT(load_error(), HasSubstr("checksum of a layer"));
}

TEST_F(SavedCache, RefusesAnotherConfigurationAndNamesTheField) {
  save_cache(file(), random_cache(small_config(), 20, 14), "tag");
  const auto refuses = [&](auto change, const char* name) {
    CacheConfig config = small_config();
    change(config);
    EXPECT_THAT(error_of([&] { load(config); }), HasSubstr(name));
  };
  refuses([](CacheConfig& c) { c.rope.theta = std::nextafter(10000.0, 2e4); },
          "RoPE theta 10000; this one has 10000.000000000002");
  refuses([](CacheConfig& c) { c.rope.pairs.layout = RopeLayout::kInterleaved; }, "RoPE layout 0");
  refuses([](CacheConfig& c) { c.rope.pairs.rotary_dim = 2; }, "rotary_dim 4; this one has 2");
  refuses([](CacheConfig& c) { c.rope.scaling = RopeScaling::kLinear; }, "RoPE scaling 0");
  refuses([](CacheConfig& c) { c.rope.factor = 2; }, "RoPE factor 1");
  refuses([](CacheConfig& c) { c.rope.low_freq_factor = 2; }, "low_freq_factor 1");
  refuses([](CacheConfig& c) { c.rope.high_freq_factor = 2; }, "high_freq_factor 4");
  refuses([](CacheConfig& c) { c.rope.original_max_position = 2; }, "original_max_position 8192");
  refuses([](CacheConfig& c) { c.rope.pairs.head_dim = 8; }, "head_dim 4");
  refuses([](CacheConfig& c) { c.num_kv_heads = 1; }, "num_kv_heads 2");
  refuses([](CacheConfig& c) { c.exact_type = FloatType::kFp16; }, "exact_type 0");
  refuses([](CacheConfig& c) { c.window = 5; }, "window 4; this one has 5");
  refuses([](CacheConfig& c) { c.sinks = 2; }, "sinks 1");
  refuses([](CacheConfig& c) { c.page_size = 16; }, "page_size 8");
}

TEST_F(SavedCache, RefusesOtherCodecsAndAnotherTag) {
  save_cache(file(), random_cache(small_config(), 20, 15), "tag");
  const auto error_with = [&](const std::vector<LayerCodec>& codecs, const std::string& tag) {
    return error_of([&] { load_cache(file(), small_config(), codecs, tag); });
  };
  std::vector<LayerCodec> others = codecs_;
  others[1].keys = small_codec(3, true).keys;
  EXPECT_THAT(error_with(others, "tag"), AllOf(HasSubstr("layer 1"), HasSubstr("key codec"),
                                               HasSubstr(others[1].keys->digest().to_text())));
  others = codecs_;
  others[2].values = nullptr;
  EXPECT_THAT(error_with(others, "tag"),
              AllOf(HasSubstr("layer 2"), HasSubstr("value codec"), HasSubstr("this one is none")));
  others = codecs_;
  std::swap(others[0], others[3]);
  EXPECT_THAT(error_with(others, "tag"), HasSubstr("layer 0"));
  others.pop_back();
  EXPECT_THAT(error_with(others, "tag"), HasSubstr("4 layers; this one has 3"));
  EXPECT_THAT(error_with(codecs_, "gat"), AllOf(HasSubstr("\"tag\""), HasSubstr("\"gat\"")));
  EXPECT_THAT(error_of([&] { save_cache(file(), load(), std::string(kMaxCacheTag + 1, 't')); }),
              AllOf(HasSubstr("4097"), HasSubstr("4096")));
}

// One weight of one codec apart.
TEST_F(SavedCache, DigestsTellCodecsApart) {
  const KeyCodec& keys = *codecs_[1].keys;
  std::vector<KeyCodebook<float>> books = {keys.codebook(0), keys.codebook(1)};
  EXPECT_EQ(KeyCodec(books).digest(), keys.digest());
  books[1].rows.back() = std::nextafter(books[1].rows.back(), 2.0f);
  EXPECT_NE(KeyCodec(books).digest(), keys.digest());
  books = {keys.codebook(0), keys.codebook(1)};
  for (KeyCodebook<float>& book : books) book.config.beam_width = 2;
  EXPECT_NE(KeyCodec(books).digest(), keys.digest());
  for (KeyCodebook<float>& book : books) {
    book.config.beam_width = 1;
    book.pair_weights = {1.0f, 1.0f};
  }
  EXPECT_NE(KeyCodec(books).digest(), keys.digest());
  const ValueCodec& values = *codecs_[0].values;
  ValueCodecWeights weights = values.weights();
  EXPECT_EQ(ValueCodec(values.config(), weights).digest(), values.digest());
  weights.output_bias[0] += 1.0f;
  EXPECT_NE(ValueCodec(values.config(), weights).digest(), values.digest());
}

/// A file whose checksums fit, made by somebody who wants more than to be read.
class CraftedCache : public SavedCache {
 protected:
  CraftedCache() {
    save_cache(file(), random_cache(small_config(), 40, 16), "tag");
    const std::string text = read_file(file());
    bytes_.assign(text.begin(), text.end());
    std::memcpy(&preamble_, bytes_.data(), sizeof preamble_);
    header_ = detail::parse_cache_header(header_bytes(), "");
    data_.assign(
        bytes_.begin() + static_cast<std::ptrdiff_t>(sizeof preamble_ + preamble_.header_bytes),
        bytes_.end());
  }
  std::span<const std::uint8_t> header_bytes() const {
    return std::span(bytes_).subspan(sizeof preamble_, preamble_.header_bytes);
  }
  /// Writes the file anew with digests that fit, and tries to read it.
  std::string error_of_crafted() {
    const std::vector<std::uint8_t> header = detail::to_bytes(header_);
    preamble_.header_bytes = static_cast<std::uint32_t>(header.size());
    preamble_.file_bytes = sizeof preamble_ + header.size() + data_.size();
    std::string text(reinterpret_cast<const char*>(&preamble_), sizeof preamble_);
    text.append(header.begin(), header.end());
    text.append(data_.begin(), data_.end());
    testing_support::repair_digests({reinterpret_cast<std::uint8_t*>(text.data()), text.size()});
    write_file(file(), text);
    return load_error();
  }

  /// Where the page `page` of layer 0 begins in `data_`.
  std::size_t page_at(std::size_t page) const {
    const LayerCache cache(small_config(), codecs_[0]);
    const Index row = 2 * kChannels * 2;
    const LayerExtent& extent = header_.layers[0].extent;
    const Index rows = small_config().sinks + extent.length - extent.exact_begin;
    return static_cast<std::size_t>(rows * row) +
           page * static_cast<std::size_t>(cache.page_layout().page_bytes());
  }

  std::vector<std::uint8_t> bytes_, data_;
  detail::CachePreamble preamble_;
  detail::CacheHeader header_;
};

TEST_F(CraftedCache, IsReadWhileNothingIsWrong) {
  EXPECT_EQ(error_of_crafted(), "(no error)");
}

TEST_F(CraftedCache, CannotPointOutsideACodebook) {
  const PageLayout layout(8, FloatType::kBf16, 2, 4, codecs_[0]);
  std::uint8_t* const stream = data_.data() + page_at(1) + layout.key_stream(1);
  for (const std::uint32_t code : {5, 6, 7}) {
    put_bits(stream, 3, 3, code);
    EXPECT_THAT(error_of_crafted(), AllOf(HasSubstr("is " + std::to_string(code)),
                                          HasSubstr("5 centroids"), HasSubstr("token 9")));
  }
}

TEST_F(CraftedCache, CannotHoldNumbersThatAreNotFinite) {
  const PageLayout layout(8, FloatType::kBf16, 2, 4, codecs_[0]);
  const std::vector<std::uint8_t> good = data_;
  for (const std::size_t at : {std::size_t{0}, page_at(0) - 2,
                               page_at(2) + static_cast<std::size_t>(layout.key_norm(3, 0)),
                               page_at(2) + static_cast<std::size_t>(layout.value_scale(3, 0))}) {
    const std::uint16_t infinity = 0x7f80;
    std::memcpy(data_.data() + at, &infinity, 2);
    EXPECT_THAT(error_of_crafted(), HasSubstr("must be finite")) << at;
    data_ = good;
  }
}

TEST_F(CraftedCache, CannotLieAboutItsBounds) {
  const detail::CacheHeader good = header_;
  const auto refused = [&](auto change) {
    header_ = good;
    change(header_.layers[0]);
    EXPECT_THAT(error_of_crafted(), HasSubstr(file().string()));
  };
  const auto refuses_extent = [&](auto change) {
    header_ = good;
    change(header_.layers[0].extent);
    EXPECT_NE(error_of_crafted(), "(no error)");
  };
  const Index huge = std::numeric_limits<Index>::max();
  for (const Index by : {Index{-1}, Index{1}, Index{8}, huge / 2, -huge, huge}) {
    const auto plus = [by](Index& x) {
      x = static_cast<Index>(static_cast<std::uint64_t>(x) + static_cast<std::uint64_t>(by));
    };
    SCOPED_TRACE(by);
    refuses_extent([&](LayerExtent& e) { plus(e.length); });
    refuses_extent([&](LayerExtent& e) { plus(e.exact_begin); });
    if (by < -1 || by > 8) refuses_extent([&](LayerExtent& e) { plus(e.exact_floor); });
    if (by != -1 && by != 1) refuses_extent([&](LayerExtent& e) { plus(e.coded_end); });
    refused([&](detail::LayerRecord& r) { r.data_bytes += static_cast<std::uint64_t>(by); });
  }
  header_ = good;
  header_.layers.pop_back();
  EXPECT_THAT(error_of_crafted(), HasSubstr("belong to no layer"));
}

class InterruptedSave : public SavedCache {
 protected:
  InterruptedSave()
      : old_(random_cache(small_config(), 12, 17)), new_(random_cache(small_config(), 20, 18)) {
    save_cache(file(), new_, "tag");
    size_ = static_cast<std::size_t>(fs::file_size(file()));
    save_cache(file(), old_, "tag");
  }
  std::string save_error(FaultyFiles& files) {
    return error_of([&] { detail::save_cache(file(), new_, "tag", files); });
  }

  Cache old_, new_;
  std::size_t size_;  ///< of the new file
};

TEST_F(InterruptedSave, LeavesTheOldFileWholeAtEveryByte) {
  const std::string old_bytes = read_file(file());
  for (const int error : {EIO, ENOSPC}) {
    for (std::size_t bytes = 0; bytes < size_; bytes += kStep) {
      FaultyFiles files;
      files.bytes_until_fault = bytes;
      files.error = error;
      ASSERT_THAT(save_error(files),
                  AllOf(HasSubstr(file().string()), HasSubstr(std::strerror(error))));
      ASSERT_EQ(files_in_folder(), 1u);
      ASSERT_EQ(read_file(file()), old_bytes) << bytes;
    }
    expect_equal(load(), old_);
  }
  FaultyFiles files;
  files.bytes_until_fault = size_;
  EXPECT_EQ(save_error(files), "(no error)");
  expect_equal(load(), new_);
}

TEST_F(InterruptedSave, LeavesTheOldFileWholeWhereTheProcessEnds) {
  const std::string old_bytes = read_file(file());
  for (std::size_t bytes = 0; bytes < size_; bytes += kStep) {
    FaultyFiles files;
    files.bytes_until_fault = bytes;
    files.dies = true;
    ASSERT_NE(save_error(files), "(no error)");
    ASSERT_EQ(read_file(file()), old_bytes) << bytes;
  }
  EXPECT_GT(files_in_folder(), size_ / kStep / 2);  // what it left behind is in nobody's way
  save_cache(file(), new_, "tag");
  expect_equal(load(), new_);
}

TEST_F(InterruptedSave, LeavesTheOldFileWholeWhereACallFails) {
  for (const char* call : {"create", "sync", "close", "rename"})
    for (const bool dies : {false, true}) {
      FaultyFiles files;
      files.failing_call = call;
      files.dies = dies;
      EXPECT_THAT(save_error(files), HasSubstr(std::strerror(EIO))) << call;
      expect_equal(load(), old_);
    }
  EXPECT_EQ(files_in_folder(), 1u + 3u);  // of the three calls that died with a file at hand
}

TEST_F(InterruptedSave, GoesOnAfterShortWritesAndInterruptions) {
  save_cache(folder_.path() / "whole", new_, "tag");
  for (const std::size_t longest : {1, 7, 4096}) {
    FaultyFiles files;
    files.longest_transfer = longest;
    files.interrupts = true;
    EXPECT_EQ(save_error(files), "(no error)");
    EXPECT_EQ(read_file(file()), read_file(folder_.path() / "whole"));
    const Cache loaded = detail::load_cache(file(), small_config(), codecs_, "tag", files);
    expect_equal(loaded, new_);
  }
}

TEST_F(InterruptedSave, ReadingThatFailsAtAnyByteIsAnError) {
  save_cache(file(), new_, "tag");
  const auto load_with = [&](FaultyFiles& files) {
    return error_of([&] { detail::load_cache(file(), small_config(), codecs_, "tag", files); });
  };
  for (std::size_t bytes = 0; bytes < size_; bytes += kStep) {
    FaultyFiles files;
    files.bytes_until_fault = bytes;
    ASSERT_THAT(load_with(files), AllOf(HasSubstr("at byte " + std::to_string(bytes)),
                                        HasSubstr(std::strerror(EIO))));
  }
  FaultyFiles files;
  files.failing_call = "open";
  EXPECT_THAT(load_with(files), HasSubstr("cannot be opened"));
}

}  // namespace
}  // namespace commvq
