#pragma once

#include <cstdint>

#include "decode_attention/key_scores/code_readers.cuh"
#include "decode_attention/problem.cuh"

namespace commvq::cuda::key_scores {

/// A lane's tokens of a block: four in a row, which are on one page.
template <bool kKeepsPage>
struct LaneTokens {
  const std::int32_t* table;   ///< of the sequence
  int first;                   ///< token
  int last;                    ///< token of the sequence that has codes
  const std::uint8_t* page{};  ///< if it is kept

  __device__ __forceinline__ LaneTokens(const Problem& p, int seq, int block_token, int last_)
      : table(p.block_table + Index{seq} * p.max_blocks),
        first(block_token + static_cast<int>(threadIdx.x) % 32 / 4 * 4),
        last(last_) {
    if (kKeepsPage) page = find_page(p);
  }

  __device__ __forceinline__ const std::uint8_t* page_of(const Problem& p) const {
    return kKeepsPage ? page : find_page(p);
  }
  /// Of the first token, or beyond the last one, of that on the last one's page.
  __device__ __forceinline__ int slot(const Problem& p) const { return first & (p.page.size - 1); }

  /// Starts reading the codes.
  template <int kGroups>
  __device__ __forceinline__ void fetch_codes(const Problem& p, const PlaneCodes& plane,
                                              QuadCodes<kGroups>& codes) const {
    codes.fetch(plane, page_of(p), static_cast<unsigned>(slot(p)));
  }
  /// Starts reading those of head `head` of tokens `half` and `half` + 2 of the four. Beyond the
  /// last token bits need not be codes.
  __device__ __forceinline__ void fetch_codes(const Problem& p, const KeyCodes& codes, int head,
                                              int half, AnyCodes (&readers)[2]) const {
#pragma unroll
    for (int t = 0; t < 2; ++t)
      readers[t].fetch(codes, page_of(p),
                       head * p.page.size + (min(first + half + 2 * t, last) & (p.page.size - 1)));
  }

  /// The tokens' key norms and value scales, all bf16.
  __device__ __forceinline__ void fetch_scales(const Problem& p, int head, uint2& norms,
                                               uint2& scales) const {
    const std::uint8_t* const from = page_of(p) + 2 * slot(p);
    norms = *reinterpret_cast<const uint2*>(from + (p.page.key_norms + head * p.page.norm_stride));
    scales = *reinterpret_cast<const uint2*>(from + p.page.value_scales);
  }

 private:
  __device__ __forceinline__ const std::uint8_t* find_page(const Problem& p) const {
    // Beyond the last token there may be no page.
    return p.pages + table[min(first, last) >> p.page.shift] * p.page_stride;
  }
};

}  // namespace commvq::cuda::key_scores
