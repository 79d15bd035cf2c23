#pragma once

#include "encoder_view.hpp"

namespace commvq::cuda {

/// Where a token's codes go.
struct PagePlace {
  std::uint8_t* page;
  int slot;

  /// `place` is that of the slot mapping, not negative.
  __device__ PagePlace(const DevicePageLayout& layout, const PagedCodes& pages, Index place) {
    const int shift = __ffs(layout.page_size) - 1;  // a power of two
    page = pages.data + (place >> shift) * pages.page_stride;
    slot = static_cast<int>(place & (layout.page_size - 1));
  }
};

/// Writes bits [32 word, 32 word + 32) of a token's codes of a plane: one of its whole words, or
/// after the last of them the tail.
__device__ __forceinline__ void write_key_word(const DevicePageLayout& layout,
                                               const KeyPlane& plane, int head,
                                               const PagePlace& place, int word,
                                               std::uint32_t bits) {
  if (word < plane.num_words) {
    reinterpret_cast<std::uint32_t*>(place.page + layout.key_words(plane, head, place.slot))[word] =
        bits;
    return;
  }
  // Other tokens' tails share the words; see `write_values`.
  const Index at = layout.key_tail_bit(plane, head, place.slot);
  auto* const tail = reinterpret_cast<std::uint32_t*>(place.page) + at / 32;
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
