#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>

#include "core/hasher.hpp"
#include "io/saved_cache_format.hpp"

namespace commvq::testing_support {

/// Writes digests that fit into the bytes of a saved cache, so that a reader believes what else is
/// in them. Bytes that are too few for what they claim keep the digests that have no place.
inline void repair_digests(std::span<std::uint8_t> file) {
  detail::CachePreamble preamble;
  if (file.size() < sizeof preamble) return;
  std::memcpy(&preamble, file.data(), sizeof preamble);
  const std::span<std::uint8_t> rest = file.subspan(sizeof preamble);
  const auto header = rest.first(std::min<std::size_t>(preamble.header_bytes, rest.size()));

  std::span<const std::uint8_t> data = rest.subspan(header.size());
  const auto record_bytes = static_cast<std::size_t>(detail::kLayerRecordBytes);
  constexpr std::size_t kDataBytes = 64, kDataDigest = 72;  // in a layer's record
  for (auto at = static_cast<std::size_t>(detail::kCacheHeaderBytes);
       at + record_bytes <= header.size(); at += record_bytes) {
    std::uint64_t data_bytes = 0;
    std::memcpy(&data_bytes, header.data() + at + kDataBytes, sizeof data_bytes);
    const auto of_layer =
        data.first(static_cast<std::size_t>(std::min<std::uint64_t>(data_bytes, data.size())));
    data = data.subspan(of_layer.size());
    detail::Hasher hasher;
    hasher.add(of_layer);
    const Digest digest = hasher.digest();
    std::memcpy(header.data() + at + kDataDigest, &digest, sizeof digest);
  }
  preamble.digest = detail::digest_of(preamble, header);
  std::memcpy(file.data(), &preamble, sizeof preamble);
}

}  // namespace commvq::testing_support
