#include "commvq/cache/cache.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

namespace commvq {
namespace {

/// Tokens are coded in multiples of so many, so that the encoders' weights are read once for all.
constexpr Index kCodingBlock = 32;
/// Exact copies kept beyond what the next query needs: so many tokens may be truncated and written
/// anew without a query reading codes of its window.
constexpr Index kExactSlack = 32;
/// Tokens widened to floats at a time while coding.
constexpr Index kCodingChunk = 512;

/// Smallest magnitude that rounds to infinity.
float overflow_of(FloatType type) {
  switch (type) {
    case FloatType::kBf16:
      return 0x1.FFp127f;
    case FloatType::kFp16:
      return 65520.0f;
    case FloatType::kFp32:
      break;
  }
  return std::numeric_limits<float>::infinity();
}

void require_storable(MatrixView<const float> rows, const char* what, Index first_token,
                      FloatType type) {
  const float limit = overflow_of(type);
  for (Index t = 0; t < rows.rows; ++t)
    for (Index channel = 0; channel < rows.cols; ++channel)
      if (!(std::abs(rows(t, channel)) < limit))
        fail(what, " of token ", first_token + t, ", channel ", channel, " is ", rows(t, channel),
             "; it must be finite and fit ", name_of(type));
}

/// A norm that cannot be stored must be refused with its key: once the key is in the window, every
/// later append would fail.
void require_codable_norms(MatrixView<const float> keys, const KeyCodec& codec, Index first_token) {
  constexpr double kMaxNorm = 3.37e38;  // bf16's largest, less what rounding the key may add
  const Index channels = keys.cols / codec.num_norms();
  for (Index t = 0; t < keys.rows; ++t)
    for (Index first = 0; first < keys.cols; first += channels) {
      double sum = 0;
      for (Index i = first; i < first + channels; ++i)
        sum += static_cast<double>(keys(t, i)) * keys(t, i);
      require(std::sqrt(sum) <= kMaxNorm, "key of token ", first_token + t, " has norm ",
              std::sqrt(sum), " over channels [", first, ", ", first + channels, "); the limit is ",
              kMaxNorm, ": scale the keys down");
    }
}

/// Likewise a value that needs a scale beyond bf16: one so large is coded at once, to find out.
void require_codable_scales(MatrixView<const float> values, const ValueCodec& codec,
                            Index first_token) {
  constexpr double kLarge = 1e30;  // others overflow with decoders of numbers below 1e-8 alone
  std::vector<std::uint8_t> code(static_cast<std::size_t>(codec.code_bytes()));
  std::vector<std::uint16_t> scales(static_cast<std::size_t>(codec.config().num_blocks));
  for (Index t = 0; t < values.rows; ++t) {
    double sum = 0;
    for (Index i = 0; i < values.cols; ++i) sum += static_cast<double>(values(t, i)) * values(t, i);
    if (std::sqrt(sum) < kLarge) continue;
    try {
      codec.encode(values.middle_rows(t, 1), {code.data(), 1, codec.code_bytes()}, scales.data());
    } catch (const Error&) {
      fail("value of token ", first_token + t, " has norm ", std::sqrt(sum),
           " and needs a scale beyond bf16's range, 3.39e38; scale the values down");
    }
  }
}

void require_shape(MatrixView<const float> rows, const char* what, Index tokens, Index channels) {
  require(rows.rows == tokens && rows.cols == channels, what, " are [", rows.rows, ", ", rows.cols,
          "]; expected [", tokens, ", ", channels, "]");
}

void validate_codec(const CacheConfig& config, const LayerCodec& codec) {
  if (codec.keys) {
    const KeyCodec& keys = *codec.keys;
    require(keys.num_kv_heads() == config.num_kv_heads, "the key codec has ", keys.num_kv_heads(),
            " heads and the cache ", config.num_kv_heads);
    require(keys.config().pairs == config.rope.pairs,
            "the key codec's head_dim, rotary_dim or layout differs from the cache's: head_dim ",
            keys.config().pairs.head_dim, " and ", config.rope.pairs.head_dim, ", rotary_dim ",
            keys.config().pairs.rotary_dim, " and ", config.rope.pairs.rotary_dim);
  }
  if (codec.values) {
    const ValueCodecConfig& values = codec.values->config();
    require(values.num_channels == config.num_channels(), "the value codec has ",
            values.num_channels, " channels and the cache ", config.num_channels());
    require(config.num_kv_heads % values.num_blocks == 0, "the value codec has num_blocks ",
            values.num_blocks, ", which does not divide the cache's ", config.num_kv_heads,
            " KV heads: a block holds whole heads");
  }
}

const CacheConfig& validated(const CacheConfig& config, const LayerCodec& codec) {
  config.validate();
  validate_codec(config, codec);
  return config;
}

/// Encodes tokens `[first_token, first_token + keys.rows)` and writes them to their pages.
/// `page_of(token)` gives a page that may be written, `token` counted from the end of the sinks.
template <class PageOf>
void code_tokens(const PageLayout& layout, const LayerCodec& codec, Index first_token,
                 MatrixView<const float> keys, MatrixView<const float> values, PageOf page_of) {
  const Index count = keys.rows;
  std::vector<std::uint16_t> key_codes(
      static_cast<std::size_t>(count * layout.num_kv_heads * layout.key_codes));
  std::vector<std::uint8_t> value_codes(
      static_cast<std::size_t>(count * (layout.value_code_bits / 8)));
  std::vector<std::uint16_t> norms(static_cast<std::size_t>(count * layout.num_key_norms));
  std::vector<std::uint16_t> scales(static_cast<std::size_t>(count * layout.num_value_scales));
  const auto key_rows = as_matrix(key_codes, count, Index{layout.num_kv_heads} * layout.key_codes);
  const auto value_rows = as_matrix(value_codes, count, layout.value_code_bits / 8);
  if (codec.keys) codec.keys->encode(keys, key_rows, norms.data());
  if (codec.values) codec.values->encode(values, value_rows, scales.data());

  for (Index i = 0; i < count; ++i) {
    Page& page = page_of(first_token + i);
    const Index slot = (first_token + i) % layout.page_size;
    if (codec.keys) {
      layout.put_key(page, slot, key_rows.row(i), norms.data() + i * layout.num_key_norms);
    } else {
      round_floats(keys.row(i), layout.num_channels, layout.exact_type,
                   page.data() + layout.exact_keys(slot));
    }
    if (codec.values) {
      layout.put_value(page, slot, value_rows.row(i), scales.data() + i * layout.num_value_scales);
    } else {
      round_floats(values.row(i), layout.num_channels, layout.exact_type,
                   page.data() + layout.exact_values(slot));
    }
  }
}

/// Decodes one token of a page to `keys` and `values`, `[num_channels]` each.
void decode_token(const PageLayout& layout, const LayerCodec& codec, const Page& page, Index slot,
                  float* keys, float* values) {
  const Index channels = layout.num_channels;
  if (codec.keys) {
    std::vector<std::uint16_t> codes(
        static_cast<std::size_t>(Index{layout.num_kv_heads} * layout.key_codes));
    std::vector<std::uint16_t> norms(static_cast<std::size_t>(layout.num_key_norms));
    layout.get_key(page, slot, codes.data(), norms.data());
    codec.keys->decode({codes.data(), 1, static_cast<Index>(codes.size())}, norms.data(),
                       {keys, 1, channels});
  } else {
    widen_floats(page.data() + layout.exact_keys(slot), channels, layout.exact_type, keys);
  }
  if (codec.values) {
    std::vector<std::uint8_t> code(static_cast<std::size_t>(layout.value_code_bits / 8));
    std::vector<std::uint16_t> scales(static_cast<std::size_t>(layout.num_value_scales));
    layout.get_value(page, slot, code.data(), scales.data());
    codec.values->decode({code.data(), 1, static_cast<Index>(code.size())}, scales.data(),
                         {values, 1, channels});
  } else {
    widen_floats(page.data() + layout.exact_values(slot), channels, layout.exact_type, values);
  }
}

}  // namespace

void CacheConfig::validate() const {
  rope.validate();
  require(num_kv_heads >= 1 && num_kv_heads <= 65536, "num_kv_heads is ", num_kv_heads,
          "; it must be in [1, 65536]");
  require(window >= 0 && window <= kMaxTokens, "window is ", window, "; it must be in [0, ",
          kMaxTokens, "]");
  require(sinks >= 0 && sinks <= kMaxTokens, "sinks is ", sinks, "; it must be in [0, ", kMaxTokens,
          "]");
  require(page_size >= 8 && page_size % 8 == 0 && page_size <= (1 << 20), "page_size is ",
          page_size, "; it must be a multiple of 8 in [8, ", 1 << 20, "]");
}

LayerCache::LayerCache(const CacheConfig& config, LayerCodec codec)
    : config_(validated(config, codec)),
      codec_(std::move(codec)),
      key_tables_(KeyTables::of(codec_.keys)),
      rope_(config.rope),
      page_layout_(config.page_size, config.exact_type, config.num_kv_heads,
                   config.rope.pairs.head_dim, codec_),
      exact_begin_(config.sinks),
      exact_floor_(config.sinks),
      coded_end_(config.sinks),
      sink_store_(config.exact_type, config.num_channels()),
      exact_store_(config.exact_type, config.num_channels()) {}

Index LayerCache::bits_per_token() const {
  return page_layout_.bits_per_token();
}

Index LayerCache::allocated_bytes() const {
  return static_cast<Index>(pages_.size()) * page_layout_.page_bytes() +
         sink_store_.allocated_bytes() + exact_store_.allocated_bytes();
}

Index LayerCache::sinks_end() const {
  return std::min(config_.sinks, length_);
}

void LayerCache::append(MatrixView<const float> keys, MatrixView<const float> values) {
  require_shape(keys, "keys", keys.rows, config_.num_channels());
  require_shape(values, "values", keys.rows, config_.num_channels());
  require(keys.rows <= kMaxTokens - length_, "a cache of ", length_, " tokens has no room for ",
          keys.rows, " more; it holds at most ", kMaxTokens);
  require_storable(keys, "key", length_, config_.exact_type);
  require_storable(values, "value", length_, config_.exact_type);
  if (codec_.keys) require_codable_norms(keys, *codec_.keys, length_);
  if (codec_.values) require_codable_scales(values, *codec_.values, length_);
  if (keys.rows == 0) return;

  const Index count = keys.rows;
  const Index new_sinks = std::clamp(config_.sinks - length_, Index{0}, count);
  const Index old_sinks = sink_store_.size();
  const Index old_exact = exact_store_.size();
  try {
    sink_store_.push_back(keys.middle_rows(0, new_sinks), values.middle_rows(0, new_sinks));
    exact_store_.push_back(keys.middle_rows(new_sinks, count - new_sinks),
                           values.middle_rows(new_sinks, count - new_sinks));
    const Index needed = length_ + count - config_.window - coded_end_;
    if (needed > 0) {
      const Index in_blocks = (needed + kCodingBlock - 1) / kCodingBlock * kCodingBlock;
      code_up_to(std::min(length_ + count, coded_end_ + in_blocks));
    }
  } catch (...) {
    sink_store_.truncate(old_sinks);
    exact_store_.truncate(old_exact);
    throw;
  }
  length_ += count;
  const Index keep_from = length_ - (config_.window + count - 1) - kExactSlack;
  if (keep_from > exact_begin_) {
    exact_store_.pop_front(keep_from - exact_begin_);
    exact_begin_ = keep_from;
  }
}

/// Codes `[coded_end_, end)` from exact copies. If it throws, nothing that can be seen has changed.
void LayerCache::code_up_to(Index end) {
  const std::size_t old_pages = pages_.size();
  const Index sinks = config_.sinks;
  const Index page_size = config_.page_size;
  const auto channels = static_cast<std::size_t>(config_.num_channels());
  const auto page_of = [&](Index token) -> Page& { return writable_page(token / page_size); };
  try {
    while (static_cast<Index>(pages_.size()) * page_size < end - sinks)
      pages_.push_back(std::make_shared<Page>(static_cast<std::size_t>(page_layout_.page_bytes())));
    for (Index first = coded_end_; first < end; first += kCodingChunk) {
      const Index count = std::min(kCodingChunk, end - first);
      std::vector<float> keys(static_cast<std::size_t>(count) * channels);
      std::vector<float> values(keys.size());
      const auto key_rows = as_matrix(keys, count, config_.num_channels());
      const auto value_rows = as_matrix(values, count, config_.num_channels());
      read_exact(first, key_rows, value_rows);
      code_tokens(page_layout_, codec_, first - sinks, key_rows, value_rows, page_of);
    }
  } catch (...) {
    pages_.resize(old_pages);
    throw;
  }
  coded_end_ = end;
}

/// Widens exact copies of tokens `[first, first + keys.rows)`, none of them a sink.
void LayerCache::read_exact(Index first, MatrixView<float> keys, MatrixView<float> values) const {
  for (Index i = 0; i < keys.rows; ++i) {
    const Index row = first + i - exact_begin_;
    widen_floats(exact_store_.keys(row), keys.cols, config_.exact_type, keys.row(i));
    widen_floats(exact_store_.values(row), values.cols, config_.exact_type, values.row(i));
  }
}

/// The page, made this cache's own first if another one shares it.
Page& LayerCache::writable_page(Index page) {
  PagePtr& pointer = pages_[static_cast<std::size_t>(page)];
  if (pointer.use_count() > 1) pointer = std::make_shared<Page>(*pointer);
  // Whoever gave up the page last may have read it in another thread.
  std::atomic_thread_fence(std::memory_order_acquire);
  return *pointer;
}

void LayerCache::truncate(Index length) {
  require(length >= 0 && length <= length_, "cannot truncate a cache of ", length_, " tokens to ",
          length);
  if (length == length_) return;
  const Index sinks = config_.sinks;
  length_ = length;
  sink_store_.truncate(sinks_end());
  coded_end_ = std::max(sinks, std::min(coded_end_, length));
  exact_begin_ = std::max(sinks, std::min(exact_begin_, length));
  exact_floor_ = exact_begin_;
  exact_store_.truncate(std::max(Index{0}, length - exact_begin_));
  pages_.resize(
      static_cast<std::size_t>((coded_end_ - sinks + config_.page_size - 1) / config_.page_size));
}

Index LayerCache::coded_end_for(Index position) const {
  return std::clamp(position + 1 - config_.window, exact_begin_, coded_end_);
}

Index LayerCache::first_query_position() const {
  if (exact_begin_ == exact_floor_) return 0;
  return std::max(Index{0}, exact_begin_ + config_.window - 1);
}

void LayerCache::decode_tokens(Index query_position, Index first, MatrixView<float> keys,
                               MatrixView<float> values) const {
  require_shape(keys, "keys", keys.rows, config_.num_channels());
  require_shape(values, "values", keys.rows, config_.num_channels());
  require(query_position >= first_query_position() && query_position < length_, "query position ",
          query_position, " is not in [", first_query_position(), ", ", length_, ")");
  require(first >= 0 && first + keys.rows <= length_, "tokens [", first, ", ", first + keys.rows,
          ") are not in [0, ", length_, ")");
  const Index coded_end = coded_end_for(query_position);
  for (Index i = 0; i < keys.rows; ++i) {
    const Index token = first + i;
    if (token >= config_.sinks && token < coded_end) {
      const Index coded = token - config_.sinks;
      const Page& page = *pages_[static_cast<std::size_t>(coded / config_.page_size)];
      decode_token(page_layout_, codec_, page, coded % config_.page_size, keys.row(i),
                   values.row(i));
      continue;
    }
    const bool is_sink = token < config_.sinks;
    const ExactStore& store = is_sink ? sink_store_ : exact_store_;
    const Index row = is_sink ? token : token - exact_begin_;
    widen_floats(store.keys(row), keys.cols, config_.exact_type, keys.row(i));
    widen_floats(store.values(row), values.cols, config_.exact_type, values.row(i));
  }
}

Cache::Cache(const CacheConfig& config, std::vector<LayerCodec> codecs) {
  require(!codecs.empty(), "a cache needs at least one layer");
  layers_.reserve(codecs.size());
  for (LayerCodec& codec : codecs) layers_.emplace_back(config, std::move(codec));
}

Cache::Cache(std::vector<LayerCache> layers) : layers_(std::move(layers)) {
  require(!layers_.empty(), "a cache needs at least one layer");
  for (std::size_t i = 1; i < layers_.size(); ++i)
    require(layers_[i].config() == layers_[0].config(), "layers 0 and ", i,
            " have different configurations; all layers of a cache share one");
}

LayerCache& Cache::layer(int layer) {
  return const_cast<LayerCache&>(static_cast<const Cache&>(*this).layer(layer));
}

const LayerCache& Cache::layer(int layer) const {
  require(layer >= 0 && layer < num_layers(), "layer ", layer, " is not in [0, ", num_layers(),
          ")");
  return layers_[static_cast<std::size_t>(layer)];
}

Index Cache::length() const {
  Index shortest = layers_.front().length();
  for (const LayerCache& cache : layers_) shortest = std::min(shortest, cache.length());
  return shortest;
}

void Cache::truncate(Index length) {
  require(length >= 0 && length <= this->length(), "cannot truncate a cache of ", this->length(),
          " tokens to ", length);
  for (LayerCache& cache : layers_) cache.truncate(length);
}

void Cache::clear() {
  truncate(0);
}

Index Cache::allocated_bytes() const {
  Index bytes = 0;
  for (const LayerCache& cache : layers_) bytes += cache.allocated_bytes();
  return bytes;
}

}  // namespace commvq
