#pragma once

#include "encoder_view.hpp"

namespace commvq::cuda {

/// The norm of a key that cannot be coded.
constexpr std::uint16_t kNanBf16 = 0x7fc0;

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

/// What the writing of some tokens' key codes needs, from the first of them on.
struct KeyTargets {
  const std::int64_t* places;  ///< of the slot mapping
  const std::uint16_t* norms;  ///< those of the head, `norm_stride` apart; NaN: codes are zeros
  int norm_stride;
  int num_tokens;

  __device__ KeyTargets(const DevicePageLayout& layout, int head, const std::int64_t* slot_mapping,
                        const std::uint16_t* all_norms, Index first_token, int count)
      : places(slot_mapping + first_token),
        norms(all_norms + first_token * layout.norms_per_token +
              (layout.norms_per_token == 1 ? 0 : head)),
        norm_stride(layout.norms_per_token),
        num_tokens(count) {}
};

/// Writes the tokens' codes of one group, [num_tokens][stride], a word a lane of the warp.
__device__ __forceinline__ void write_key_codes(const DevicePageLayout& layout, int head, int group,
                                                const std::uint16_t* codes, int stride,
                                                const KeyTargets& targets,
                                                const PagedCodes& pages) {
  for (int p = 0; p < layout.num_planes; ++p) {
    const KeyPlane& plane = layout.planes[p];
    if (plane.group != group) continue;
    const int words_per_token = plane.num_words + 1;  // with the tail
    for (int i = static_cast<int>(threadIdx.x) % 32; i < targets.num_tokens * words_per_token;
         i += 32) {
      const int token = i / words_per_token, word = i % words_per_token;
      if (targets.places[token] < 0) continue;
      const bool coded = targets.norms[token * targets.norm_stride] != kNanBf16;
      // Bits [32 word, 32 word + 32) of the plane's codes one after the other.
      const int first_bit = word * 32;
      std::uint32_t bits = 0;
      for (int k = first_bit / layout.code_bits; k < plane.num_books; ++k) {
        const int shift = k * layout.code_bits - first_bit;
        if (shift >= 32) break;
        const std::uint32_t code = coded ? codes[token * stride + plane.book(k)] : 0;
        bits |= shift >= 0 ? code << shift : code >> -shift;
      }
      write_key_word(layout, plane, head, PagePlace(layout, pages, targets.places[token]), word,
                     bits);
    }
  }
}

}  // namespace commvq::cuda
