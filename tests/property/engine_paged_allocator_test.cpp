// Random schedules of sequences over few pages: every sequence must read its own tokens' codes.
#include <algorithm>
#include <cstring>
#include <map>
#include <random>

#include "commvq/cuda/page_layout.hpp"
#include "commvq/value_codec/value_codec.hpp"

#include <gmock/gmock.h>

#include "paged_allocator/sequences.hpp"

namespace paged {
namespace {

using commvq::cuda::DevicePageLayout;
using testing::HasSubstr;
using testing::ThrowsMessage;
using Rng = std::mt19937_64;

constexpr int kPageSize = 16;

/// Two layers of different codecs.
std::vector<DevicePageLayout> layouts() {
  commvq::KeyCodecConfig keys;
  keys.pairs = {64, 64, commvq::RopeLayout::kHalfSplit};
  keys.group_pairs = 32;
  keys.codebook_size = 16;
  keys.num_stages = 3;
  const DevicePageLayout one(keys, 2, commvq::ValueCodecConfig::paper_1bit(128), kPageSize,
                             64 << 10);
  keys.norm_per_head = true;
  keys.codebook_size = 32;
  return {one, DevicePageLayout(keys, 2, commvq::ValueCodecConfig::paper_2bit(128), kPageSize,
                                64 << 10)};
}

/// What a token is coded as: it depends on all tokens up to it, as a model's keys and values do.
struct TokenCodes {
  TokenCodes(const DevicePageLayout& layout, std::size_t layer, std::uint64_t history)
      : keys(static_cast<std::size_t>(layout.num_kv_heads * layout.num_groups * layout.num_books)),
        norms(static_cast<std::size_t>(layout.norms_per_token)),
        value(static_cast<std::size_t>(layout.num_code_bits / 8)) {
    Rng rng(history * 31 + layer);
    for (std::uint16_t& code : keys)
      code = static_cast<std::uint16_t>(rng() % static_cast<unsigned>(layout.codebook_size));
    for (std::uint16_t& norm : norms) norm = static_cast<std::uint16_t>(rng());
    for (std::uint8_t& byte : value) byte = static_cast<std::uint8_t>(rng());
    scale = static_cast<std::uint16_t>(rng());
  }
  bool operator==(const TokenCodes&) const = default;

  std::vector<std::uint16_t> keys, norms;
  std::vector<std::uint8_t> value;
  std::uint16_t scale = 0;
};

std::uint64_t history_after(std::uint64_t history, int token) {
  return (history + static_cast<std::uint64_t>(token) + 1) * 0x9e3779b97f4a7c15ULL;
}

/// An engine's pages in host memory, and what every sequence should hold.
class Engine {
 public:
  explicit Engine(int num_blocks)
      : layouts_(layouts()),
        sequences_(num_blocks, kPageSize, make_pages(num_blocks), copy_bytes) {}

  Sequences& sequences() { return sequences_; }
  const std::map<Sequences::Id, std::vector<int>>& expected() const { return expected_; }

  Sequences::Id add(const std::vector<int>& prompt) {
    const auto id = sequences_.add(prompt);
    expected_[id].assign(prompt.begin(), prompt.begin() + sequences_.length(id));
    return id;
  }
  Sequences::Id fork(Sequences::Id id) {
    const auto copy = sequences_.fork(id);
    expected_[copy] = expected_[id];
    return copy;
  }
  void remove(Sequences::Id id) {
    sequences_.remove(id);
    expected_.erase(id);
  }
  void truncate(Sequences::Id id, Index length) {
    sequences_.truncate(id, length);
    expected_[id].resize(static_cast<std::size_t>(length));
  }
  /// Writes tokens to the places that the allocator gives them.
  bool append(Sequences::Id id, const std::vector<int>& tokens) {
    if (!sequences_.reserve(id, static_cast<Index>(tokens.size()))) return false;
    const auto slots = sequences_.slots(id, static_cast<Index>(tokens.size()));
    std::uint64_t history = 0;
    for (const int token : expected_[id]) history = history_after(history, token);
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      history = history_after(history, tokens[t]);
      for (std::size_t layer = 0; layer < layouts_.size(); ++layer) {
        const TokenCodes codes(layouts_[layer], layer, history);
        put_token(layouts_[layer], page(layer, slots[t] / kPageSize),
                  static_cast<int>(slots[t] % kPageSize), codes.keys.data(), codes.norms.data(),
                  codes.value.data(), &codes.scale);
      }
    }
    sequences_.commit(id, tokens);
    expected_[id].insert(expected_[id].end(), tokens.begin(), tokens.end());
    return true;
  }

  /// Every sequence in memory reads through its block table what was written for its tokens.
  void check() {
    for (const auto& [id, tokens] : expected_) {
      ASSERT_EQ(sequences_.length(id), static_cast<Index>(tokens.size()));
      if (sequences_.is_swapped_out(id)) {
        ASSERT_TRUE(sequences_.block_table(id).empty());
        continue;
      }
      std::uint64_t history = 0;
      for (std::size_t t = 0; t < tokens.size(); ++t) {
        history = history_after(history, tokens[t]);
        const Index block = sequences_.block_table(id)[t / kPageSize];
        for (std::size_t layer = 0; layer < layouts_.size(); ++layer) {
          const TokenCodes written(layouts_[layer], layer, history);
          TokenCodes read(layouts_[layer], layer, 0);
          get_token(layouts_[layer], page(layer, block), static_cast<int>(t % kPageSize),
                    read.keys.data(), read.norms.data(), read.value.data(), &read.scale);
          ASSERT_EQ(read, written) << "sequence " << id << ", token " << t << ", layer " << layer;
        }
      }
    }
    check_users();
  }

  Index num_copies() const { return copies; }

 private:
  static inline Index copies = 0;
  static void copy_bytes(void* to, const void* from, Index bytes) {
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
    ++copies;
  }
  std::vector<LayerPages> make_pages(int num_blocks) {
    copies = 0;
    std::vector<LayerPages> result;
    for (const DevicePageLayout& layout : layouts_) {
      const Index stride = layout.page_bytes + 32;
      memory_.emplace_back(static_cast<std::size_t>(num_blocks * stride), std::uint8_t{0xee});
      result.push_back({memory_.back().data(), stride, layout.page_bytes});
    }
    return result;
  }
  std::uint8_t* page(std::size_t layer, Index block) {
    return memory_[layer].data() + block * (layouts_[layer].page_bytes + 32);
  }
  /// The pool counts the users that block tables show, and the rest is available.
  void check_users() {
    std::map<int, int> users;
    for (const auto& [id, tokens] : expected_)
      for (const int block : sequences_.block_table(id)) ++users[block];
    for (int block = 0; block < sequences_.pool().num_blocks(); ++block)
      ASSERT_EQ(sequences_.pool().num_users(block), users[block]) << "block " << block;
    const auto in_use =
        std::count_if(users.begin(), users.end(), [](const auto& u) { return u.second > 0; });
    ASSERT_EQ(sequences_.pool().num_available(), sequences_.pool().num_blocks() - in_use);
  }

  std::vector<DevicePageLayout> layouts_;
  std::vector<std::vector<std::uint8_t>> memory_;
  Sequences sequences_;
  std::map<Sequences::Id, std::vector<int>> expected_;
};

std::vector<int> counting(int first, int count) {
  std::vector<int> tokens(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) tokens[static_cast<std::size_t>(i)] = first + i;
  return tokens;
}

TEST(PagedAllocator, RandomSchedulesKeepEverySequencesTokens) {
  for (const std::uint64_t seed : {1u, 2u}) {
    Rng rng(seed);
    Engine engine(20);
    Sequences& sequences = engine.sequences();
    Index refused = 0, swaps = 0, reused = 0, truncations = 0;
    std::vector<Sequences::Id> ids;
    for (int step = 0; step < 700; ++step) {
      const auto action = rng() % 100;
      if (ids.empty() || (action < 12 && ids.size() < 8)) {
        // Prompts with one of two beginnings.
        std::vector<int> prompt = counting(static_cast<int>(rng() % 2) * 1000, 40);
        prompt.push_back(static_cast<int>(rng() % 3));
        ids.push_back(engine.add(prompt));
        reused += sequences.length(ids.back());
        engine.append(ids.back(), {prompt.begin() + sequences.length(ids.back()), prompt.end()});
      } else {
        const std::size_t i = rng() % ids.size();
        const auto id = ids[i];
        if (action < 22) {
          engine.remove(id);
          ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(i));
        } else if (sequences.is_swapped_out(id)) {
          refused += !sequences.swap_in(id);
        } else if (action < 32 && ids.size() < 8) {
          ids.push_back(engine.fork(id));
        } else if (action < 42) {
          engine.truncate(
              id, static_cast<Index>(rng() % static_cast<std::uint64_t>(sequences.length(id) + 1)));
          ++truncations;
        } else if (action < 52) {
          sequences.swap_out(id);
          ++swaps;
        } else {
          refused += !engine.append(
              id, counting(static_cast<int>(rng() % 3), static_cast<int>(rng() % 25)));
        }
      }
      ASSERT_NO_FATAL_FAILURE(engine.check()) << "seed " << seed << ", step " << step;
    }
    // The schedule must have met everything that it is about.
    EXPECT_GT(sequences.pool().num_evictions(), 20);
    EXPECT_GT(engine.num_copies(), 100);
    EXPECT_GT(refused, 20);
    EXPECT_GT(swaps, 20);
    EXPECT_GT(reused, 100);
    EXPECT_GT(truncations, 20);
    for (const auto id : ids) engine.remove(id);
    EXPECT_EQ(sequences.pool().num_available(), 20);
  }
}

TEST(PagedAllocator, ChunkedPrefillFillsTheSamePages) {
  Engine engine(16);
  const std::vector<int> prompt = counting(0, 75);
  const auto whole = engine.add(prompt);
  ASSERT_TRUE(engine.append(whole, prompt));
  const auto chunked = engine.add(counting(500, 1));  // shares nothing
  for (int first = 0; first < 75; first += 11) {
    const auto end = prompt.begin() + std::min(75, first + 11);
    ASSERT_TRUE(engine.append(chunked, {prompt.begin() + first, end}));
  }
  engine.check();
  EXPECT_EQ(engine.sequences().block_table(chunked).size(), 5u);
}

TEST(PagedAllocator, PrefixesAreSharedAndAtLeastOneTokenIsLeft) {
  Engine engine(16);
  Sequences& sequences = engine.sequences();
  const std::vector<int> prompt = counting(0, 48);
  const auto first = engine.add(prompt);
  ASSERT_TRUE(engine.append(first, prompt));
  const auto same = engine.add(prompt);
  EXPECT_EQ(sequences.length(same), 32);
  EXPECT_EQ(sequences.block_table(same)[1], sequences.block_table(first)[1]);
  std::vector<int> longer = prompt;
  longer.push_back(7);
  EXPECT_EQ(sequences.length(engine.add(longer)), 48);
  // The second page's tokens after another beginning are other contents.
  std::vector<int> other = counting(100, 16);
  other.insert(other.end(), prompt.begin() + 16, prompt.end());
  EXPECT_EQ(sequences.length(engine.add(other)), 0);
  // Contents outlive their sequence until the blocks are needed.
  for (const auto& [id, tokens] : std::map(engine.expected())) engine.remove(id);
  EXPECT_EQ(sequences.pool().num_remembered(), 3);
  EXPECT_EQ(sequences.length(engine.add(longer)), 48);
}

TEST(PagedAllocator, AForkCopiesThePageThatItWritesTo) {
  Engine engine(8);
  Sequences& sequences = engine.sequences();
  const auto first = engine.add(counting(0, 1));
  ASSERT_TRUE(engine.append(first, counting(0, 20)));
  const auto branch = engine.fork(first);
  EXPECT_EQ(sequences.block_table(first), sequences.block_table(branch));
  EXPECT_THAT([&] { (void)sequences.slots(branch, 1); },
              ThrowsMessage<commvq::Error>(HasSubstr("reserve room after a fork")));
  ASSERT_TRUE(engine.append(branch, {900}));
  ASSERT_TRUE(engine.append(first, {800}));
  engine.check();
  EXPECT_EQ(sequences.block_table(first)[0], sequences.block_table(branch)[0]);
  EXPECT_NE(sequences.block_table(first)[1], sequences.block_table(branch)[1]);
  EXPECT_EQ(engine.num_copies(), 2);  // one page in each layer: the last user writes in place
}

TEST(PagedAllocator, SwappingIsByteExactAndFindsWhatIsStillThere) {
  Engine engine(6);
  Sequences& sequences = engine.sequences();
  const auto first = engine.add(counting(0, 1));
  ASSERT_TRUE(engine.append(first, counting(0, 40)));
  const auto branch = engine.fork(first);
  sequences.swap_out(first);
  EXPECT_TRUE(sequences.is_swapped_out(first));
  EXPECT_THAT([&] { (void)sequences.reserve(first, 1); },
              ThrowsMessage<commvq::Error>(HasSubstr("swapped out")));
  const Index copied = engine.num_copies();
  ASSERT_TRUE(sequences.swap_in(first));
  EXPECT_EQ(engine.num_copies() - copied, 2);  // the part-filled page alone
  engine.check();
  // Everything else takes the blocks in the meantime.
  sequences.swap_out(first);
  engine.remove(branch);
  const auto large = engine.add(counting(300, 1));
  ASSERT_TRUE(engine.append(large, counting(300, 90)));
  EXPECT_FALSE(sequences.swap_in(first));
  EXPECT_EQ(sequences.length(first), 40);
  engine.remove(large);
  ASSERT_TRUE(sequences.swap_in(first));
  engine.check();
}

TEST(PagedAllocator, NoRoomChangesNothing) {
  Engine engine(4);
  const auto first = engine.add(counting(0, 1));
  ASSERT_TRUE(engine.append(first, counting(0, 40)));
  const auto table = engine.sequences().block_table(first);
  EXPECT_FALSE(engine.append(first, counting(0, 30)));
  EXPECT_EQ(engine.sequences().block_table(first), table);
  ASSERT_TRUE(engine.append(first, counting(0, 24)));
  engine.check();
}

TEST(PagedAllocator, MisuseIsNamed) {
  EXPECT_THAT([] { BlockPool pool(0); }, ThrowsMessage<commvq::Error>(HasSubstr("0 blocks")));
  std::uint8_t byte = 0;
  EXPECT_THAT(
      [&] {
        Sequences(4, 16, {{&byte, 8, 9}}, [](void*, const void*, Index) {});
      },
      ThrowsMessage<commvq::Error>(HasSubstr("overlap")));
  Engine engine(4);
  Sequences& sequences = engine.sequences();
  EXPECT_THAT([&] { sequences.remove(3); }, ThrowsMessage<commvq::Error>(HasSubstr("sequence 3")));
  const auto id = engine.add(counting(0, 5));
  EXPECT_THAT([&] { (void)sequences.slots(id, 1); },
              ThrowsMessage<commvq::Error>(HasSubstr("are reserved")));
  EXPECT_THAT([&] { sequences.commit(id, counting(0, 1)); },
              ThrowsMessage<commvq::Error>(HasSubstr("are reserved")));
  EXPECT_THAT([&] { sequences.truncate(id, 1); },
              ThrowsMessage<commvq::Error>(HasSubstr("truncation to 1 of 0")));
  EXPECT_THAT([&] { (void)sequences.swap_in(id); },
              ThrowsMessage<commvq::Error>(HasSubstr("not swapped out")));
  BlockPool pool(2);
  EXPECT_THAT([&] { pool.release(1); }, ThrowsMessage<commvq::Error>(HasSubstr("not in use")));
  EXPECT_THAT([&] { pool.retain(2); }, ThrowsMessage<commvq::Error>(HasSubstr("pool of 2")));
}

}  // namespace
}  // namespace paged
