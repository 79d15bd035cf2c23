#pragma once

#include "encoder_view.hpp"

namespace commvq::cuda {

/// Writes bits [32 word, 32 word + 32) of a token's codes of a plane: one of its whole words, or
/// after the last of them the tail.
__device__ __forceinline__ void write_key_word(const DevicePageLayout& layout,
                                               const KeyPlane& plane, int head, std::uint8_t* page,
                                               int slot, int word, std::uint32_t bits) {
  if (word < plane.num_words) {
    reinterpret_cast<std::uint32_t*>(page + layout.key_words(plane, head, slot))[word] = bits;
    return;
  }
  // Other tokens' tails share the words; see `write_values`.
  const Index at = layout.key_tail_bit(plane, head, slot);
  auto* const tail = reinterpret_cast<std::uint32_t*>(page) + at / 32;
  const int shift = static_cast<int>(at % 32);
  const auto wanted = static_cast<std::uint64_t>(bits) << shift;
  const auto mask = ((std::uint64_t{1} << plane.tail_bits) - 1) << shift;
  for (int part = 0; part < 2; ++part) {
    const auto part_mask = static_cast<std::uint32_t>(mask >> (32 * part));
    if (part_mask == 0) continue;
    const std::uint32_t old = *const_cast<volatile std::uint32_t*>(tail + part);
    const std::uint32_t change =
        (old ^ static_cast<std::uint32_t>(wanted >> (32 * part))) & part_mask;
    if (change != 0) atomicXor(tail + part, change);
  }
}

}  // namespace commvq::cuda
