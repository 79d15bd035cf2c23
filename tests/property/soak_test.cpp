// Hundreds of sequences that grow, fork, shrink, leave and come back, against a plain model of the
// cache: the list of every sequence's tokens. Every step follows from the seed.
//
//     COMMVQ_SOAK_OPERATIONS=1000000 COMMVQ_SOAK_SEED=7 soak_test
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <set>

#include "commvq/attention/attention.hpp"
#include "commvq/io/saved_cache.hpp"

#include <gtest/gtest.h>
#include <omp.h>
#include <sys/resource.h>

#include "reference/attention_reference.hpp"
#include "reference/example_data.hpp"
#include "reference/heap.hpp"
#include "reference/random_cache.hpp"

namespace commvq {
namespace {

using testing_support::normal_floats;
using testing_support::random_key_codec;
using testing_support::random_value_codec;
using testing_support::Rng;
using testing_support::TemporaryFolder;

constexpr int kWords = 97;
constexpr Index kMaxSequences = 300;
constexpr Index kMaxLength = 400;
constexpr Index kChannels = 32;  // two KV heads of 16
constexpr int kGroup = 2;

std::int64_t from_environment(const char* name, std::int64_t otherwise) {
  const char* const text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoll(text);
}

/// What one layer makes of every word that a sequence may consist of, word by word.
struct Dictionary {
  LayerCodec codec;
  std::vector<float> exact_keys, exact_values;  ///< [kWords][kChannels]: as they are stored
  std::vector<float> keys, values;              ///< the same: as codes decode
  std::vector<std::uint16_t> key_codes, norms, scales;
  std::vector<std::uint8_t> value_codes;
};

std::vector<float> rounded(const std::vector<float>& values, FloatType type) {
  std::vector<std::uint8_t> bytes(values.size() * static_cast<std::size_t>(size_of(type)));
  std::vector<float> result(values.size());
  round_floats(values.data(), static_cast<Index>(values.size()), type, bytes.data());
  widen_floats(bytes.data(), static_cast<Index>(values.size()), type, result.data());
  return result;
}

Dictionary make_dictionary(Rng& rng, const CacheConfig& config, const LayerCodec& codec) {
  Dictionary d;
  d.codec = codec;
  d.keys = d.exact_keys = rounded(normal_floats(rng, kWords * kChannels), config.exact_type);
  d.values = d.exact_values = rounded(normal_floats(rng, kWords * kChannels), config.exact_type);
  if (codec.keys) {
    const Index num_codes = codec.keys->num_kv_heads() * codec.keys->config().num_codes();
    d.key_codes.resize(static_cast<std::size_t>(kWords * num_codes));
    d.norms.resize(static_cast<std::size_t>(kWords * codec.keys->num_norms()));
    const auto codes = as_matrix(d.key_codes, kWords, num_codes);
    codec.keys->encode(as_matrix(d.exact_keys, kWords, kChannels), codes, d.norms.data());
    codec.keys->decode(codes, d.norms.data(), as_matrix(d.keys, kWords, kChannels));
  }
  if (codec.values) {
    const Index code_bytes = codec.values->code_bytes();
    d.value_codes.resize(static_cast<std::size_t>(kWords * code_bytes));
    d.scales.resize(kWords);
    const auto codes = as_matrix(d.value_codes, kWords, code_bytes);
    codec.values->encode(as_matrix(d.exact_values, kWords, kChannels), codes, d.scales.data());
    codec.values->decode(codes, d.scales.data(), as_matrix(d.values, kWords, kChannels));
  }
  return d;
}

struct Sequence {
  Cache cache;
  std::vector<int> words;

  Index length() const { return static_cast<Index>(words.size()); }
};

struct Counts {
  std::int64_t operations = 0, tokens = 0, forks = 0, truncations = 0, evictions = 0, swaps = 0,
               queries = 0, codes_compared = 0, most_sequences = 0, most_pages = 0;
};

class Soak {
 public:
  explicit Soak(std::uint64_t seed) : rng_(seed) {
    config_.rope.pairs.head_dim = config_.rope.pairs.rotary_dim = 16;
    config_.num_kv_heads = 2;
    config_.window = 12;
    config_.sinks = 2;
    config_.page_size = 16;
    KeyCodecConfig keys = KeyCodecConfig::commvq_2bit(config_.rope.pairs);
    keys.codebook_size = 8;
    const auto key_codec = random_key_codec(rng_, keys, 2);
    const auto value_codec = random_value_codec(rng_, kChannels, 1, 16);
    for (const LayerCodec& codec : {LayerCodec{key_codec, value_codec}, {nullptr, value_codec}})
      layers_.push_back(make_dictionary(rng_, config_, codec));
    tables_ = std::make_unique<Cache>(config_, codecs());
#if defined(COMMVQ_COUNTS_HEAP)
    start_bytes_ = heap::live_bytes;
#endif
  }

  void run(std::int64_t operations) {
    for (std::int64_t i = 0; i < operations && !testing::Test::HasFatalFailure(); ++i) {
      SCOPED_TRACE(testing::Message() << "operation " << i);
      step();
      ++counts.operations;
      if (i % 1000 == 999) check_memory();
    }
  }
  /// All sequences leave, and so does their memory.
  void clear() {
    sequences_ = {};
#if defined(COMMVQ_COUNTS_HEAP)
    ASSERT_LE(heap::live_bytes - start_bytes_, kFixedBytes);
#endif
  }

  Counts counts;

 private:
  std::vector<LayerCodec> codecs() const {
    std::vector<LayerCodec> result;
    for (const Dictionary& layer : layers_) result.push_back(layer.codec);
    return result;
  }
  Index below(Index limit) {
    return static_cast<Index>(rng_() % static_cast<std::uint64_t>(limit));
  }
  Sequence& any() {
    return sequences_[static_cast<std::size_t>(below(static_cast<Index>(sequences_.size())))];
  }

  void step() {
    if (sequences_.empty()) return create();
    Sequence& sequence = any();
    const Index draw = below(1000);
    if (draw < 450) return append(sequence, 1);
    if (draw < 600) return append(sequence, 2 + below(40));
    if (draw < 620) return create();
    if (draw < 670) return fork(sequence);
    if (draw < 750) return reject_speculated(sequence);
    if (draw < 770) return truncate(sequence, below(sequence.length() + 1));
    if (draw < 830) return evict();
    if (draw < 833) return swap(sequence);
    if (draw < 850) return compare_codes(sequence);
    attend_and_compare(sequence);
  }

  void create() {
    if (static_cast<Index>(sequences_.size()) < kMaxSequences)
      sequences_.push_back({Cache(config_, codecs()), {}});
  }

  void append(Sequence& sequence, Index count) {
    if (sequence.length() + count > kMaxLength) return truncate(sequence, below(kMaxLength / 2));
    std::vector<std::size_t> words;
    for (Index i = 0; i < count; ++i) words.push_back(static_cast<std::size_t>(below(kWords)));
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
      std::vector<float> keys, values;
      for (const std::size_t word : words) {
        const auto add = [word](const std::vector<float>& from, std::vector<float>& to) {
          to.insert(to.end(), from.begin() + static_cast<std::ptrdiff_t>(word * kChannels),
                    from.begin() + static_cast<std::ptrdiff_t>((word + 1) * kChannels));
        };
        add(layers_[layer].exact_keys, keys);
        add(layers_[layer].exact_values, values);
      }
      sequence.cache.layer(static_cast<int>(layer))
          .append(as_matrix(keys, count, kChannels), as_matrix(values, count, kChannels));
    }
    sequence.words.insert(sequence.words.end(), words.begin(), words.end());
    counts.tokens += count;
  }

  void fork(const Sequence& sequence) {
    if (static_cast<Index>(sequences_.size()) >= kMaxSequences) return evict();
    Sequence copy{sequence.cache.fork(), sequence.words};
    sequences_.push_back(std::move(copy));
    ++counts.forks;
  }

  /// A few tokens are tried, some of them are taken back.
  void reject_speculated(Sequence& sequence) {
    const Index tried = 1 + below(8);
    if (sequence.length() + tried > kMaxLength) return;
    append(sequence, tried);
    truncate(sequence, sequence.length() - below(tried + 1));
  }

  void truncate(Sequence& sequence, Index length) {
    length = std::min(length, sequence.length());
    sequence.cache.truncate(length);
    sequence.words.resize(static_cast<std::size_t>(length));
    ++counts.truncations;
  }

  void evict() {
    std::swap(any(), sequences_.back());
    sequences_.pop_back();
    ++counts.evictions;
  }

  /// To a file and back.
  void swap(Sequence& sequence) {
    const auto path = folder_.path() / "sequence";
    save_cache(path, sequence.cache, "soak");
    sequence.cache = load_cache(path, config_, codecs(), "soak");
    ++counts.swaps;
  }

  /// Every code, norm and scale in the pages is that of its word.
  void compare_codes(const Sequence& sequence) {
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
      const LayerCache& cache = sequence.cache.layer(static_cast<int>(layer));
      ASSERT_EQ(cache.length(), sequence.length());
      for (Index token = config_.sinks; token < cache.coded_end(); ++token) {
        const int word = sequence.words[static_cast<std::size_t>(token)];
        ASSERT_TRUE(holds_word(cache, token - config_.sinks, layers_[layer], word)) << token;
      }
      counts.codes_compared += cache.coded_end() - config_.sinks;
    }
  }

  static bool holds_word(const LayerCache& cache, Index coded, const Dictionary& d, int word) {
    const PageLayout& layout = cache.page_layout();
    const Page& page = *cache.pages()[static_cast<std::size_t>(coded / layout.page_size)];
    const Index slot = coded % layout.page_size;
    const auto equals_row = [word](const auto& row, const auto& rows) {
      return std::equal(row.begin(), row.end(),
                        rows.begin() + word * static_cast<std::ptrdiff_t>(row.size()));
    };
    bool equal = true;
    if (layout.keys_coded()) {
      std::vector<std::uint16_t> codes(
          static_cast<std::size_t>(layout.num_kv_heads * layout.key_codes));
      std::vector<std::uint16_t> norms(static_cast<std::size_t>(layout.num_key_norms));
      layout.get_key(page, slot, codes.data(), norms.data());
      equal = equals_row(codes, d.key_codes) && equals_row(norms, d.norms);
    }
    std::vector<std::uint8_t> code(static_cast<std::size_t>(layout.value_code_bits / 8));
    std::vector<std::uint16_t> scales(static_cast<std::size_t>(layout.num_value_scales));
    layout.get_value(page, slot, code.data(), scales.data());
    return equal && equals_row(code, d.value_codes) && equals_row(scales, d.scales);
  }

  /// One query head at one of the newest positions, against the formula in double precision over
  /// what the model says that this position sees.
  void attend_and_compare(const Sequence& sequence) {
    const auto layer = static_cast<std::size_t>(below(static_cast<Index>(layers_.size())));
    const LayerCache& cache = sequence.cache.layer(static_cast<int>(layer));
    const Index allowed = sequence.length() - cache.first_query_position();
    if (allowed < 1) return;
    const Index count = 1 + below(std::min(allowed, Index{4}));
    const std::vector<float> queries = normal_floats(rng_, count * kGroup * kChannels);
    std::vector<float> output(queries.size());
    const auto query_rows = as_matrix(queries, count, kGroup * kChannels);
    attend(cache, query_rows, {}, as_matrix(output, count, kGroup * kChannels));

    const Index row = below(count), head = below(2 * kGroup),
                position = sequence.length() - count + row;
    std::vector<float> keys, values;
    see(sequence, cache, layers_[layer], position, keys, values);
    std::vector<double> expected(16);
    reference::attend_head(cache.rope(), query_rows.row(row) + head * 16, position,
                           as_matrix(keys, position + 1, kChannels),
                           as_matrix(values, position + 1, kChannels), head / kGroup * 16, {},
                           expected.data());
    for (std::size_t i = 0; i < expected.size(); ++i)
      ASSERT_NEAR(output[static_cast<std::size_t>((row * 2 * kGroup + head) * 16) + i], expected[i],
                  1e-2)
          << "query at " << position << ", head " << head;
    ++counts.queries;
  }

  /// Keys and values of tokens `[0, position]` for a query at `position`: exact where they are a
  /// sink or in the window, codes elsewhere. Of a window that a truncation moved back, tokens whose
  /// exact copies were gone by then are codes.
  void see(const Sequence& sequence, const LayerCache& cache, const Dictionary& d, Index position,
           std::vector<float>& keys, std::vector<float>& values) const {
    const Index window_begin = position + 1 - config_.window;
    for (Index token = 0; token <= position; ++token) {
      const bool coded =
          token >= config_.sinks && (token < window_begin || token < cache.exact_begin());
      const auto first = sequence.words[static_cast<std::size_t>(token)] * kChannels;
      const auto add = [first](const std::vector<float>& from, std::vector<float>& to) {
        to.insert(to.end(), from.begin() + first, from.begin() + first + kChannels);
      };
      add(coded ? d.keys : d.exact_keys, keys);
      add(coded ? d.values : d.exact_values, values);
    }
  }

  /// The heap holds the distinct pages, the exact copies and little else.
  void check_memory() {
    std::set<const Page*> pages;
    [[maybe_unused]] std::int64_t bytes = 0;
    for (const Sequence& sequence : sequences_) {
      for (int i = 0; i < sequence.cache.num_layers(); ++i) {
        const LayerCache& cache = sequence.cache.layer(i);
        for (const PagePtr& page : cache.pages())
          if (pages.insert(page.get()).second) bytes += cache.page_layout().page_bytes();
        bytes += cache.sink_store().allocated_bytes() + cache.exact_store().allocated_bytes();
      }
    }
    counts.most_sequences =
        std::max(counts.most_sequences, static_cast<std::int64_t>(sequences_.size()));
    counts.most_pages = std::max(counts.most_pages, static_cast<std::int64_t>(pages.size()));
#if defined(COMMVQ_COUNTS_HEAP)
    constexpr std::int64_t kPerPage = 128, kPerSequence = 8192;
    const std::int64_t limit = bytes + kPerPage * static_cast<std::int64_t>(pages.size()) +
                               kPerSequence * static_cast<std::int64_t>(sequences_.size()) +
                               kFixedBytes;
    ASSERT_LE(heap::live_bytes - start_bytes_, limit);
#endif
  }

  Rng rng_;
  CacheConfig config_;
  std::vector<Dictionary> layers_;
  std::unique_ptr<Cache> tables_;  ///< keeps the codecs' tables
  std::vector<Sequence> sequences_;
  TemporaryFolder folder_{"soak"};
#if defined(COMMVQ_COUNTS_HEAP)
  static constexpr std::int64_t kFixedBytes = 65536;
  std::int64_t start_bytes_ = 0;  ///< of the heap, before the first sequence
#endif
};

TEST(Soak, SequencesEqualAPlainModel) {
  const std::int64_t operations =
      from_environment("COMMVQ_SOAK_OPERATIONS", testing_support::repeats(20000, 3000));
  const auto seed = static_cast<std::uint64_t>(from_environment("COMMVQ_SOAK_SEED", 1));
  const int threads = omp_get_max_threads();
  omp_set_num_threads(1);  // the work is small
  const auto start = std::chrono::steady_clock::now();
  Soak soak(seed);
  soak.run(operations);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  omp_set_num_threads(threads);
  soak.clear();
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const Counts& c = soak.counts;
  std::printf(
      "seed %llu: %lld operations, %lld tokens, %lld forks, %lld truncations, %lld evictions, "
      "%lld to a file and back, %lld queries and %lld codes compared, at most %lld sequences and "
      "%lld pages, "
      "%.1f seconds, %ld KiB resident at most\n",
      static_cast<unsigned long long>(seed), static_cast<long long>(c.operations),
      static_cast<long long>(c.tokens), static_cast<long long>(c.forks),
      static_cast<long long>(c.truncations), static_cast<long long>(c.evictions),
      static_cast<long long>(c.swaps), static_cast<long long>(c.queries),
      static_cast<long long>(c.codes_compared), static_cast<long long>(c.most_sequences),
      static_cast<long long>(c.most_pages), seconds.count(), usage.ru_maxrss);
  EXPECT_EQ(c.operations, operations);
  for (const std::int64_t count :
       {c.tokens, c.forks, c.truncations, c.evictions, c.swaps, c.queries, c.codes_compared})
    EXPECT_GT(count, operations / 1000);
}

}  // namespace
}  // namespace commvq
