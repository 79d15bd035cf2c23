#include "commvq/io/saved_cache.hpp"

#include <algorithm>
#include <charconv>
#include <type_traits>
#include <utility>

#include "core/hasher.hpp"
#include "io/input_file.hpp"
#include "io/replacing_file.hpp"
#include "io/saved_cache_format.hpp"
#include "io/strict_json.hpp"

namespace commvq {
namespace {

using namespace detail;

/// Saved caches hold what users wrote: they are nobody's but their owner's.
constexpr mode_t kOwnerOnly = 0600;

using Bytes = std::span<const std::uint8_t>;

Digest keys_digest(const LayerCodec& codec) {
  return codec.keys ? codec.keys->digest() : Digest{};
}
Digest values_digest(const LayerCodec& codec) {
  return codec.values ? codec.values->digest() : Digest{};
}

/// The page with its slots from `used` on zeroed: they hold tokens that were truncated.
Page without_rest(const PageLayout& layout, Page page, Index used) {
  const std::vector<std::uint16_t> codes(
      static_cast<std::size_t>(Index{layout.num_kv_heads} * layout.key_codes));
  const std::vector<std::uint16_t> norms(static_cast<std::size_t>(layout.num_key_norms));
  const std::vector<std::uint8_t> code(static_cast<std::size_t>(layout.value_code_bits / 8));
  const std::vector<std::uint16_t> scales(static_cast<std::size_t>(layout.num_value_scales));
  const Index row_bytes = layout.num_channels * size_of(layout.exact_type);
  for (Index slot = used; slot < layout.page_size; ++slot) {
    if (layout.keys_coded()) {
      layout.put_key(page, slot, codes.data(), norms.data());
    } else {
      std::fill_n(page.data() + layout.exact_keys(slot), row_bytes, std::uint8_t{0});
    }
    if (layout.values_coded()) {
      layout.put_value(page, slot, code.data(), scales.data());
    } else {
      std::fill_n(page.data() + layout.exact_values(slot), row_bytes, std::uint8_t{0});
    }
  }
  return page;
}

/// Calls `use` for a layer's data, piece by piece: sinks, exact copies, pages.
template <class Use>
void for_each_piece(const LayerCache& layer, Use use) {
  use(layer.sink_store().bytes());
  use(layer.exact_store().bytes());
  if (layer.pages().empty()) return;
  for (std::size_t i = 0; i + 1 < layer.pages().size(); ++i) use(Bytes(*layer.pages()[i]));
  const Index coded = layer.coded_end() - layer.config().sinks;
  const Index full = static_cast<Index>(layer.pages().size() - 1) * layer.config().page_size;
  use(Bytes(without_rest(layer.page_layout(), *layer.pages().back(), coded - full)));
}

LayerRecord record_of(const LayerCache& layer) {
  LayerRecord record{
      keys_digest(layer.codec()), values_digest(layer.codec()), layer.extent(), 0, {}};
  Hasher hasher;
  for_each_piece(layer, [&](Bytes bytes) {
    record.data_bytes += bytes.size();
    hasher.add(bytes);
  });
  record.data = hasher.digest();
  return record;
}

std::string to_text(double value) {
  char text[32];
  const std::to_chars_result result = std::to_chars(text, text + sizeof text, value);
  return std::string(text, result.ptr);
}
template <class T>
auto to_text(T value) {
  return static_cast<Index>(value);
}

void require_same_config(const CacheConfig& saved, const CacheConfig& wanted,
                         const std::string& where) {
  std::vector<std::string> wanted_text;
  std::size_t at = 0;
  const auto text_of = [](const auto& value) {
    std::ostringstream text;
    text << to_text(value);
    return text.str();
  };
  visit_config(wanted,
               [&](const auto& value, const char*) { wanted_text.push_back(text_of(value)); });
  visit_config(saved, [&](const auto& value, const char* name) {
    require(text_of(value) == wanted_text[at], where, ": saved from a cache with ", name, " ",
            text_of(value), "; this one has ", wanted_text[at]);
    ++at;
  });
}

void require_same_codec(const Digest& saved, const Digest& wanted, const char* side,
                        std::size_t layer, const std::string& where) {
  const auto described = [](const Digest& digest) {
    return digest == Digest{} ? "none" : digest.to_text();
  };
  require(saved == wanted, where, ": layer ", layer, " was saved with the ", side, " codec ",
          described(saved), "; this one is ", described(wanted),
          ": load the codebooks with which the cache was made");
}

/// The file belongs to this cache: all but its sizes and data.
void require_same_cache(const CacheHeader& header, const CacheConfig& config,
                        const std::vector<LayerCodec>& codecs, const std::string& tag,
                        const std::string& where) {
  require(header.tag == tag, where, ": saved with the tag ", in_quotes(header.tag),
          "; what is asked for is ", in_quotes(tag));
  require_same_config(header.config, config, where);
  require(header.layers.size() == codecs.size(), where, ": saved from a cache of ",
          header.layers.size(), " layers; this one has ", codecs.size());
  for (std::size_t i = 0; i < codecs.size(); ++i) {
    require_same_codec(header.layers[i].keys, keys_digest(codecs[i]), "key", i, where);
    require_same_codec(header.layers[i].values, values_digest(codecs[i]), "value", i, where);
  }
}

CachePreamble read_preamble(InputFile& file) {
  CachePreamble preamble;
  const auto size = static_cast<std::uint64_t>(file.size());
  require(size >= sizeof preamble, file.where(), ": ", size,
          " bytes are too few for a saved cache");
  file.read({reinterpret_cast<std::uint8_t*>(&preamble), sizeof preamble});
  require(std::ranges::equal(preamble.magic, kCacheMagic), file.where(), ": not a saved cache");
  require(preamble.version == kCacheVersion, file.where(), ": a saved cache of version ",
          preamble.version, "; this library reads version ", kCacheVersion);
  require(preamble.file_bytes == size, file.where(), ": ", size, " bytes of the ",
          preamble.file_bytes, " that were saved: it was cut short or changed");
  require(preamble.header_bytes <= size - sizeof preamble, file.where(), ": a header of ",
          preamble.header_bytes, " bytes in a file of ", size, ": it is damaged");
  return preamble;
}

CacheHeader read_header(InputFile& file) {
  const CachePreamble preamble = read_preamble(file);
  std::vector<std::uint8_t> bytes(preamble.header_bytes);
  file.read(bytes);
  require(digest_of(preamble, bytes) == preamble.digest, file.where(),
          ": the checksum of its header does not match: it is damaged");
  CacheHeader header = parse_cache_header(bytes, file.where());
  // What layers claim is read, and allocated, only if the file has it.
  auto rest = preamble.file_bytes - sizeof preamble - preamble.header_bytes;
  for (const LayerRecord& layer : header.layers) {
    require(layer.data_bytes <= rest, file.where(), ": its layers claim more bytes than it has");
    rest -= layer.data_bytes;
  }
  require(rest == 0, file.where(), ": ", rest, " bytes belong to no layer");
  return header;
}

/// Reads pieces of one layer's data, never more than there is.
class LayerReader {
 public:
  LayerReader(InputFile& file, const LayerRecord& record) : file_(file), left_(record.data_bytes) {}

  /// `count` pieces of `piece` bytes each.
  std::vector<std::uint8_t> take(Index count, Index piece) {
    require(count >= 0 &&
                static_cast<std::uint64_t>(count) <= left_ / static_cast<std::uint64_t>(piece),
            file_.where(), ": a layer of ", left_, " more bytes cannot hold ", count, " pieces of ",
            piece);
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(count * piece));
    file_.read(bytes);
    hasher_.add(bytes);
    left_ -= bytes.size();
    return bytes;
  }
  std::uint64_t left() const { return left_; }
  Digest digest() const { return hasher_.digest(); }

 private:
  InputFile& file_;
  Hasher hasher_;
  std::uint64_t left_;
};

/// A layer's cache from its data. The stated bounds say how many exact copies come before the
/// pages; that they fit each other is for the constructor to check.
LayerCache read_layer(InputFile& file, const LayerRecord& record, const CacheConfig& config,
                      LayerCodec codec) {
  const LayerExtent& extent = record.extent;
  require(extent.length >= 0 && extent.length <= kMaxTokens && extent.exact_begin >= 0,
          file.where(), ": a layer claims ", extent.length, " tokens, exact from ",
          extent.exact_begin);
  const PageLayout layout(config.page_size, config.exact_type, config.num_kv_heads,
                          config.rope.pairs.head_dim, codec);
  const Index row_bytes = 2 * config.num_channels() * size_of(config.exact_type);
  LayerReader reader(file, record);
  const auto read_rows = [&](Index count) {
    return ExactStore(config.exact_type, config.num_channels(), reader.take(count, row_bytes));
  };
  ExactStore sinks = read_rows(std::min(config.sinks, extent.length));
  ExactStore exact = read_rows(std::max(Index{0}, extent.length - extent.exact_begin));
  std::vector<PagePtr> pages;
  pages.reserve(static_cast<std::size_t>(reader.left()) /
                static_cast<std::size_t>(layout.page_bytes()));
  while (reader.left() > 0)
    pages.push_back(std::make_shared<Page>(reader.take(1, layout.page_bytes())));
  require(reader.digest() == record.data, file.where(),
          ": the checksum of a layer does not match: it is damaged");
  return LayerCache(config, std::move(codec), extent, std::move(sinks), std::move(exact),
                    std::move(pages));
}

}  // namespace

void detail::save_cache(const std::filesystem::path& path, const Cache& cache,
                        const std::string& tag, FileLayer& files) {
  require(static_cast<Index>(tag.size()) <= kMaxCacheTag, "the tag has ", tag.size(),
          " bytes; it may have ", kMaxCacheTag);
  CacheHeader header{cache.layer(0).config(), {}, tag};
  for (int i = 0; i < cache.num_layers(); ++i) header.layers.push_back(record_of(cache.layer(i)));
  const std::vector<std::uint8_t> header_bytes = to_bytes(header);
  CachePreamble preamble{};
  std::ranges::copy(kCacheMagic, preamble.magic);
  preamble.version = kCacheVersion;
  preamble.header_bytes = static_cast<std::uint32_t>(header_bytes.size());
  preamble.file_bytes = sizeof preamble + header_bytes.size();
  for (const LayerRecord& layer : header.layers) preamble.file_bytes += layer.data_bytes;
  preamble.digest = digest_of(preamble, header_bytes);

  ReplacingFile file(path, kOwnerOnly, files);
  file.write(&preamble, sizeof preamble);
  file.write(header_bytes.data(), header_bytes.size());
  for (int i = 0; i < cache.num_layers(); ++i)
    for_each_piece(cache.layer(i), [&](Bytes bytes) { file.write(bytes.data(), bytes.size()); });
  file.commit();
}

Cache detail::load_cache(const std::filesystem::path& path, const CacheConfig& config,
                         std::vector<LayerCodec> codecs, const std::string& tag, FileLayer& files) {
  config.validate();
  InputFile file(path, files);
  const CacheHeader header = read_header(file);
  require_same_cache(header, config, codecs, tag, file.where());
  std::vector<LayerCache> layers;
  layers.reserve(codecs.size());
  for (std::size_t i = 0; i < codecs.size(); ++i)
    layers.push_back(read_layer(file, header.layers[i], config, std::move(codecs[i])));
  return Cache(std::move(layers));
}

void save_cache(const std::filesystem::path& path, const Cache& cache, const std::string& tag) {
  detail::save_cache(path, cache, tag, detail::system_files());
}

Cache load_cache(const std::filesystem::path& path, const CacheConfig& config,
                 std::vector<LayerCodec> codecs, const std::string& tag) {
  return detail::load_cache(path, config, std::move(codecs), tag, detail::system_files());
}

}  // namespace commvq
