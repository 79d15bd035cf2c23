#pragma once

#include <bit>
#include <cstdint>

#include "commvq/core/view.hpp"

namespace commvq {

/// Widest code that `put_bits` and `get_bits` handle.
inline constexpr int kMaxCodeBits = 16;

/// Bits needed to tell `count` different codes apart (0 for a single one).
inline int bits_for(Index count) {
  return count <= 1 ? 0 : static_cast<int>(std::bit_width(static_cast<std::uint64_t>(count - 1)));
}

/// Bytes that hold `bits` bits.
inline Index bytes_for(Index bits) { return (bits + 7) / 8; }

/// Writes the low `width` bits of `value` at bit offset `position` of a little-endian bit stream:
/// bit i of the stream is bit i % 8 of byte i / 8. Bits outside the field keep their value.
/// `width` is in [0, kMaxCodeBits]; the bytes touched are those that the field covers.
inline void put_bits(std::uint8_t* stream, Index position, int width, std::uint32_t value) {
  std::uint8_t* byte = stream + position / 8;
  int shift = static_cast<int>(position % 8);
  while (width > 0) {
    const int taken = width < 8 - shift ? width : 8 - shift;
    const auto mask = static_cast<std::uint32_t>(((1u << taken) - 1u) << shift);
    *byte = static_cast<std::uint8_t>((*byte & ~mask) | ((value << shift) & mask));
    value >>= taken;
    width -= taken;
    shift = 0;
    ++byte;
  }
}

/// Reads `width` bits at bit offset `position`; the inverse of `put_bits`.
inline std::uint32_t get_bits(const std::uint8_t* stream, Index position, int width) {
  const std::uint8_t* byte = stream + position / 8;
  const int shift = static_cast<int>(position % 8);
  std::uint32_t window = 0;
  for (int loaded = 0; loaded < shift + width; loaded += 8)
    window |= static_cast<std::uint32_t>(*byte++) << loaded;
  return (window >> shift) & ((1u << width) - 1u);
}

}  // namespace commvq
