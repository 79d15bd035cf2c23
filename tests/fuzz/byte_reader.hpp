#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>

namespace commvq::fuzz {

/// Reads an input as a row of numbers; zeros follow its end.
class ByteReader {
 public:
  explicit ByteReader(std::span<const std::uint8_t> bytes) : bytes_(bytes) {}

  bool empty() const { return bytes_.empty(); }

  template <class T>
  T take() {
    T value{};
    const std::size_t count = std::min(sizeof(T), bytes_.size());
    std::memcpy(&value, bytes_.data(), count);
    bytes_ = bytes_.subspan(count);
    return value;
  }

  /// A number that is often small, and sometimes any of 64 bits.
  std::int64_t size() {
    const auto kind = take<std::uint8_t>();
    return kind < 224 ? kind % 40 : take<std::int64_t>();
  }

 private:
  std::span<const std::uint8_t> bytes_;
};

}  // namespace commvq::fuzz
