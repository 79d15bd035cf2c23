#pragma once

#include <cstdint>

#include "decode_attention/key_scores/code_readers.cuh"
#include "decode_attention/problem.cuh"

namespace commvq::cuda::key_scores {

/// Where a lane's tokens of a block lie: four of them, eight apart.
template <class Reader, bool kKeepsPage>
struct LaneTokens {
  const std::int32_t* table;   ///< of the sequence
  int first;                   ///< token
  int last;                    ///< token of the sequence that has codes
  const std::uint8_t* page{};  ///< of all tokens, if they are on one and it is kept

  __device__ __forceinline__ LaneTokens(const Problem& p, int seq, int block_token, int last_)
      : table(p.block_table + Index{seq} * p.max_blocks),
        first(block_token + static_cast<int>(threadIdx.x) % 32 / 4),
        last(last_) {
    if (kKeepsPage && are_on_one_page(p)) page = page_of(p, first);
  }

  /// True if blocks lie on one page and what is read beyond the last token does no harm.
  __device__ __forceinline__ static bool are_on_one_page(const Problem& p) {
    return Reader::kAnyBitsAreCodes && p.page.size >= kBlockTokens;
  }
  __device__ __forceinline__ int token(const Problem& p, int t) const {
    // Beyond the last token there may be no page.
    return are_on_one_page(p) ? first + 8 * t : min(first + 8 * t, last);
  }
  __device__ __forceinline__ const std::uint8_t* page_of(const Problem& p, int token) const {
    return p.pages + table[token >> p.page.shift] * p.page_stride;
  }
  __device__ __forceinline__ const std::uint8_t* only_page(const Problem& p) const {
    return kKeepsPage ? page : page_of(p, first);
  }
  __device__ __forceinline__ static int slot_of(const Problem& p, int token) {
    return token & (p.page.size - 1);
  }

  /// Starts reading the codes of head `head` of tokens `half` and `half` + 2 of the four.
  __device__ __forceinline__ void fetch_codes(const Problem& p, const KeyCodes& codes, int head,
                                              int half, AnyCodes (&readers)[2]) const {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int at = token(p, half + 2 * t);
      readers[t].fetch(codes, page_of(p, at), head * p.page.size + slot_of(p, at));
    }
  }
  template <int kGroups>
  __device__ __forceinline__ void fetch_codes(const Problem& p, const StageCodesPlace& place, int,
                                              int half, StageCodes<kGroups> (&readers)[2]) const {
    if (are_on_one_page(p)) {
      const int slot = slot_of(p, first) + 8 * half;
      const std::uint8_t* const words = place.words_of(only_page(p), slot);
      const std::uint8_t* const tail = place.tail_of(only_page(p), slot);
      readers[0].fetch(words, tail);
      readers[1].fetch(words + 16 * 4 * place.num_words, tail + 16 / 8 * place.tail_bits);
      return;
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int at = token(p, half + 2 * t);
      readers[t].fetch(place.words_of(page_of(p, at), slot_of(p, at)),
                       place.tail_of(page_of(p, at), slot_of(p, at)));
    }
  }

  /// The tokens' key norms and value scales, all bf16.
  __device__ __forceinline__ void fetch_scales(const Problem& p, int head,
                                               std::uint16_t (&norms)[4],
                                               std::uint16_t (&scales)[4]) const {
    const int norms_at = p.page.key_norms + head * p.page.norm_stride;
    const auto fetch = [&](int t, const std::uint8_t* from, int slot) {
      norms[t] = *reinterpret_cast<const std::uint16_t*>(from + (norms_at + 2 * slot));
      scales[t] = *reinterpret_cast<const std::uint16_t*>(from + (p.page.value_scales + 2 * slot));
    };
    if (are_on_one_page(p)) {
      const std::uint8_t* const from = only_page(p) + 2 * slot_of(p, first);
#pragma unroll
      for (int t = 0; t < 4; ++t) fetch(t, from, 8 * t);
      return;
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) fetch(t, page_of(p, token(p, t)), slot_of(p, token(p, t)));
  }
};

}  // namespace commvq::cuda::key_scores
