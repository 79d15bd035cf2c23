#pragma once

#include <cstdint>

#include "common/memory.cuh"
#include "decode_attention/code_reader.cuh"

/// Sums of the rows that tokens' codes name, in shared memory as `IntegerKeySlice::image` lays them
/// out: four sums of a byte each to a 32-bit word, word k of a thread being pairs 8k + 2q and
/// 8k + 2q + 1.
namespace commvq::cuda::key_scores {

/// Adds up the rows of two of a lane's tokens: lane 4g + q decodes tokens g, g + 8, g + 16 and
/// g + 24 of a block with three other lanes.
template <int kWidth, class Reader>
__device__ __forceinline__ void sum_byte_rows(std::uint32_t rows, const Reader& first,
                                              const Reader& second,
                                              std::uint32_t (&sums)[2][kWidth / 8]) {
  const int lane = threadIdx.x % 32;
  const int q = lane % 4;
  const bool odd = lane / 4 % 2 != 0;
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int i = 0; i < kWidth / 8; ++i) sums[t][i] = 0x80808080u;

  if constexpr (kWidth == 64) {
    // Odd tokens read the halves of a row in the other order: eight lanes then meet all 32 banks.
    const std::uint32_t part = rows + q * 16 + (odd ? 64 : 0);
    first.for_each_book([&](auto book) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const std::uint32_t address = (t == 0 ? first : second).row_address(book, part);
        const uint4 x = Reader::load(book, address);
        const uint4 y = Reader::load(book, address ^ 64);
        sums[t][0] += x.x, sums[t][1] += x.y, sums[t][2] += x.z, sums[t][3] += x.w;
        sums[t][4] += y.x, sums[t][5] += y.y, sums[t][6] += y.z, sums[t][7] += y.w;
      }
    });
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t low = sums[t][i], high = sums[t][i + 4];
        sums[t][i] = odd ? high : low;
        sums[t][i + 4] = odd ? low : high;
      }
  } else {
    // A line holds the rows of two books; odd tokens read the second one first.
    const std::uint32_t part = rows + q * 16;
    first.for_each_pair([&](auto book) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const Reader& reader = t == 0 ? first : second;
        const std::uint32_t even = reader.pair_address(book, 0, part);
        const std::uint32_t next = reader.pair_address(book, 1, part + 64);
        const uint4 x = load_shared_16<0>(odd ? next : even);
        const uint4 y = load_shared_16<0>(odd ? even : next);
        sums[t][0] += x.x + y.x, sums[t][1] += x.y + y.y;
        sums[t][2] += x.z + y.z, sums[t][3] += x.w + y.w;
      }
    });
  }
}

/// Sums of words of eight 4-bit numbers: the low halves of the bytes by themselves, and everything
/// in 36 bits, from which they are taken at the end. The former are added by multiplying with a one
/// that the compiler does not know: the units for logic and plain sums have enough to do, those for
/// products stand idle.
struct NarrowSums {
  static constexpr std::uint32_t kLow = 0x0f0f0f0fu;
  std::uint32_t low[4] = {};
  std::uint64_t all[4] = {};

  __device__ __forceinline__ void add(const uint4& v, std::uint32_t one) {
    const std::uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      asm("mad.lo.u32 %0, %1, %2, %0;" : "+r"(low[i]) : "r"(words[i] & kLow), "r"(one));
      all[i] += words[i];
    }
  }
  __device__ __forceinline__ void get(std::uint32_t (&sums)[8]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[i] = low[i];
      sums[4 + i] = static_cast<std::uint32_t>((all[i] - low[i]) >> 4);
    }
  }
};

/// The same for rows of 4 bits of plane `plane` of kPlanes, whose lines begin at `lines`. The rows
/// of the first plane's first two books come in two parts, the second ones in the line before.
template <int kPlanes, class Reader>
__device__ __forceinline__ void sum_narrow_rows(std::uint32_t lines, int plane, std::uint32_t one,
                                                const Reader& first, const Reader& second,
                                                std::uint32_t (&sums)[2][8]) {
  const int lane = threadIdx.x % 32;
  // A line holds the rows of two books; odd tokens read the second one first, so that eight lanes
  // meet all 32 banks.
  const bool odd = lane / 4 % 2 != 0;
  const std::uint32_t line_part = lines + lane % 4 * 16, part = line_part + (odd ? 64 : 0);
  // part ^ 64. Which way of saying so spills no registers was found by trying.
  const std::uint32_t other_part = kPlanes == 2                 ? line_part + (odd ? 0 : 64) * one
                                   : Reader::kTwoBookLines == 8 ? line_part + (odd ? 0 : 64)
                                                                : part ^ 64;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const Reader& reader = t == 0 ? first : second;
    NarrowSums total;
    Reader::for_each_two_books([&](auto even, auto next) {
      constexpr int kLine = even.kNumber / 2;
      if constexpr (even.kNumber == next.kNumber) {
        const std::uint32_t address = reader.row_address(even, part);
        total.add(Reader::template load_line<kLine>(address), one);
      } else {
        const std::uint32_t a = reader.shifted(even), b = reader.shifted(next);
        const std::uint32_t x = Reader::row_address(odd ? b : a, part);
        const std::uint32_t y = Reader::row_address(odd ? a : b, other_part);
        total.add(Reader::template load_line<kLine>(x), one);
        total.add(Reader::template load_line<kLine>(y), one);
        if (plane == 0 && kLine == 0) {
          total.add(Reader::template load_line<-1>(x), one);
          total.add(Reader::template load_line<-1>(y), one);
        }
      }
    });
    total.get(sums[t]);
  }
}

/// The sums of plane `plane`, a constant after unrolling, of the kPlanes, all of one shape, whose
/// rows, of kRowBits bits, begin at `rows`. `one` is 1.
template <int kWidth, int kRowBits, int kPlanes, class Reader>
__device__ __forceinline__ void sum_rows(std::uint32_t rows, int plane, std::uint32_t one,
                                         const Reader& first, const Reader& second,
                                         std::uint32_t (&sums)[2][kWidth / 8]) {
  if constexpr (kRowBits == 8) {
    sum_byte_rows<kWidth>(rows, first, second, sums);
  } else {
    const int lines_before = 1 + plane * Reader::kTwoBookLines;
    sum_narrow_rows<kPlanes>(rows + lines_before * Reader::kLineBytes, plane, one, first, second,
                             sums);
  }
}

}  // namespace commvq::cuda::key_scores
