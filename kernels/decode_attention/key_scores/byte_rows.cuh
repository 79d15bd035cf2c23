#pragma once

#include <cstdint>

#include "common/memory.cuh"
#include "decode_attention/key_scores/code_readers.cuh"
#include "decode_attention/key_scores/pair_keys.cuh"

/// Sums of rows of 8 bits, in shared memory as `IntegerKeySlice::image` lays them out: four sums of
/// a byte each to a 32-bit word, word k of a thread being pairs 8k + 2q and 8k + 2q + 1.
namespace commvq::cuda::key_scores {

template <int kWidth>
struct ByteRowSums {
  std::uint32_t of[2][kWidth / 8];  ///< [token]

  /// Adds up the rows of two of a lane's tokens, of which each takes four lanes.
  __device__ __forceinline__ ByteRowSums(std::uint32_t rows, const AnyCodes& first,
                                         const AnyCodes& second) {
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int i = 0; i < kWidth / 8; ++i) of[t][i] = 0x80808080u;
    if constexpr (kWidth == 64) {
      add_whole_lines(rows, first, second);
    } else {
      add_half_lines(rows, first, second);
    }
  }

  __device__ __forceinline__ PairKeys keys(int k, uint2 zero) const {
    PairKeys keys;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      keys.real[t] = less_zero(of[t][k], 0x4140, zero.x);
      keys.imag[t] = less_zero(of[t][k], 0x4342, zero.y);
    }
    return keys;
  }

 private:
  __device__ __forceinline__ static bool is_odd() {
    return threadIdx.x / 4 % 2 != 0;
  }
  __device__ __forceinline__ static std::uint32_t part_of(std::uint32_t rows) {
    return rows + threadIdx.x % 4 * 16;
  }

  __device__ __forceinline__ void add_whole_lines(std::uint32_t rows, const AnyCodes& first,
                                                  const AnyCodes& second) {
    // Odd tokens read the halves of a row in the other order: eight lanes then meet all 32 banks.
    const bool odd = is_odd();
    const std::uint32_t part = part_of(rows) + (odd ? 64 : 0);
    first.for_each_book([&](int book) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const std::uint32_t address = (t == 0 ? first : second).row_address(book, part);
        const uint4 x = load_shared_16<0>(address);
        const uint4 y = load_shared_16<0>(address ^ 64);
        of[t][0] += x.x, of[t][1] += x.y, of[t][2] += x.z, of[t][3] += x.w;
        of[t][4] += y.x, of[t][5] += y.y, of[t][6] += y.z, of[t][7] += y.w;
      }
    });
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t low = of[t][i], high = of[t][i + 4];
        of[t][i] = odd ? high : low;
        of[t][i + 4] = odd ? low : high;
      }
  }

  __device__ __forceinline__ void add_half_lines(std::uint32_t rows, const AnyCodes& first,
                                                 const AnyCodes& second) {
    // A line holds the rows of two books; odd tokens read the second one first.
    const bool odd = is_odd();
    const std::uint32_t part = part_of(rows);
    first.for_each_pair([&](int book) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const AnyCodes& reader = t == 0 ? first : second;
        const std::uint32_t even = reader.pair_address(book, 0, part);
        const std::uint32_t next = reader.pair_address(book, 1, part + 64);
        const uint4 x = load_shared_16<0>(odd ? next : even);
        const uint4 y = load_shared_16<0>(odd ? even : next);
        of[t][0] += x.x + y.x, of[t][1] += x.y + y.y;
        of[t][2] += x.z + y.z, of[t][3] += x.w + y.w;
      }
    });
  }

  /// A byte of each of two sums as fp16 numbers, less what stands for zero: bytes 0 and 1 with
  /// selector 0x4140, 2 and 3 with 0x4342.
  __device__ __forceinline__ static __half2 less_zero(std::uint32_t sums, unsigned selector,
                                                      std::uint32_t zero) {
    // A byte under 0x64 is the fp16 number 1024 + byte.
    return __hsub2(as_half2(__byte_perm(sums, 0x64646464u, selector)), as_half2(zero));
  }
};

}  // namespace commvq::cuda::key_scores
