#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "commvq/cache/cache.hpp"
#include "commvq/core/digest.hpp"
#include "commvq/io/saved_cache.hpp"

#include "io/file_layer.hpp"

/// The layout of a saved cache, see docs/saved_cache.md: a preamble, a header, the layers' data.
namespace commvq::detail {

static_assert(std::endian::native == std::endian::little, "saved caches are little-endian");

/// Its first byte is no ASCII and its last two are changed by programs that take it for text.
inline constexpr std::uint8_t kCacheMagic[8] = {0x89, 'C', 'V', 'Q', 'K', 'V', '\r', '\n'};
inline constexpr std::uint32_t kCacheVersion = 1;

struct CachePreamble {
  std::uint8_t magic[8];
  std::uint32_t version;
  std::uint32_t header_bytes;
  std::uint64_t file_bytes;
  Digest digest;  ///< of the fields before it and of the header
};
static_assert(sizeof(CachePreamble) == 40 && offsetof(CachePreamble, digest) == 24);

/// What the header says of one layer.
struct LayerRecord {
  Digest keys, values;  ///< of the codecs; zeros for a side that stays exact
  LayerExtent extent;
  std::uint64_t data_bytes = 0;
  Digest data;
};

struct CacheHeader {
  CacheConfig config;
  std::vector<LayerRecord> layers;
  std::string tag;
};

/// Calls `field` for all numbers of the header in the order of the file; it writes or reads them.
template <class Config, class Field>
void visit_config(Config& config, Field&& field) {
  auto& rope = config.rope;
  field(rope.pairs.head_dim, "head_dim");
  field(rope.pairs.rotary_dim, "rotary_dim");
  field(rope.pairs.layout, "RoPE layout");
  field(rope.scaling, "RoPE scaling");
  field(rope.theta, "RoPE theta");
  field(rope.factor, "RoPE factor");
  field(rope.low_freq_factor, "RoPE low_freq_factor");
  field(rope.high_freq_factor, "RoPE high_freq_factor");
  field(rope.original_max_position, "RoPE original_max_position");
  field(config.num_kv_heads, "num_kv_heads");
  field(config.exact_type, "exact_type");
  field(config.window, "window");
  field(config.sinks, "sinks");
  field(config.page_size, "page_size");
}
template <class Record, class Field>
void visit_layer(Record& layer, Field&& field) {
  field(layer.keys);
  field(layer.values);
  field(layer.extent.length);
  field(layer.extent.exact_begin);
  field(layer.extent.exact_floor);
  field(layer.extent.coded_end);
  field(layer.data_bytes);
  field(layer.data);
}

/// Bytes of the header without layers and tag, and of one layer in it.
inline constexpr Index kCacheHeaderBytes = 96;
inline constexpr Index kLayerRecordBytes = 88;

std::vector<std::uint8_t> to_bytes(const CacheHeader& header);
/// `where` names the file in messages. Throws `Error` for a header that is not as long as it says.
CacheHeader parse_cache_header(std::span<const std::uint8_t> bytes, const std::string& where);

/// Of the preamble's fields before its digest and of the header.
Digest digest_of(const CachePreamble& preamble, std::span<const std::uint8_t> header);

/// `save_cache` and `load_cache` through other system calls, for tests of their failures.
void save_cache(const std::filesystem::path& path, const Cache& cache, const std::string& tag,
                FileLayer& files);
Cache load_cache(const std::filesystem::path& path, const CacheConfig& config,
                 std::vector<LayerCodec> codecs, const std::string& tag, FileLayer& files);

}  // namespace commvq::detail
