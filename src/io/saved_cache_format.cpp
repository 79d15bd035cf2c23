#include "io/saved_cache_format.hpp"

#include <type_traits>

#include "core/hasher.hpp"

namespace commvq::detail {
namespace {

/// In the file: enumerators as 32 bits, all else as in memory.
template <class T>
struct Stored {
  using type = T;
};
template <class T>
requires std::is_enum_v<T>
struct Stored<T> {
  using type = std::int32_t;
};

class Writer {
 public:
  template <class T>
  void operator()(const T& value, const char* = nullptr) {
    const auto stored = static_cast<typename Stored<T>::type>(value);
    const auto* const from = reinterpret_cast<const std::uint8_t*>(&stored);
    bytes_.insert(bytes_.end(), from, from + sizeof stored);
  }
  std::vector<std::uint8_t> take() { return std::move(bytes_); }

 private:
  std::vector<std::uint8_t> bytes_;
};

/// Reads what is known to be there.
class Reader {
 public:
  explicit Reader(std::span<const std::uint8_t> bytes) : bytes_(bytes) {}
  template <class T>
  void operator()(T& value, const char* = nullptr) {
    typename Stored<T>::type stored;
    std::memcpy(&stored, bytes_.data(), sizeof stored);
    bytes_ = bytes_.subspan(sizeof stored);
    value = static_cast<T>(stored);
  }
  std::span<const std::uint8_t> rest() const { return bytes_; }

 private:
  std::span<const std::uint8_t> bytes_;
};

}  // namespace

std::vector<std::uint8_t> to_bytes(const CacheHeader& header) {
  Writer writer;
  visit_config(header.config, writer);
  writer(static_cast<std::uint32_t>(header.layers.size()));
  writer(static_cast<std::uint32_t>(header.tag.size()));
  for (const LayerRecord& layer : header.layers) visit_layer(layer, writer);
  std::vector<std::uint8_t> bytes = writer.take();
  bytes.insert(bytes.end(), header.tag.begin(), header.tag.end());
  return bytes;
}

CacheHeader parse_cache_header(std::span<const std::uint8_t> bytes, const std::string& where) {
  const auto size = static_cast<Index>(bytes.size());
  require(size >= kCacheHeaderBytes, where, ": a header of ", size, " bytes; it has at least ",
          kCacheHeaderBytes);
  Reader reader(bytes);
  CacheHeader header;
  std::uint32_t num_layers = 0, tag_bytes = 0;
  visit_config(header.config, reader);
  reader(num_layers);
  reader(tag_bytes);
  const Index needed = kCacheHeaderBytes + Index{num_layers} * kLayerRecordBytes + tag_bytes;
  require(size == needed, where, ": a header of ", size, " bytes; ", num_layers,
          " layers and a tag of ", tag_bytes, " bytes need ", needed);
  header.layers.resize(num_layers);
  for (LayerRecord& layer : header.layers) visit_layer(layer, reader);
  header.tag.assign(reader.rest().begin(), reader.rest().end());
  return header;
}

Digest digest_of(const CachePreamble& preamble, std::span<const std::uint8_t> header) {
  Hasher hasher;
  hasher.add({reinterpret_cast<const std::uint8_t*>(&preamble), offsetof(CachePreamble, digest)});
  hasher.add(header);
  return hasher.digest();
}

}  // namespace commvq::detail
