#pragma once

#include <cstdint>

#include "commvq/cuda/device_codebooks.hpp"

#include "common/memory.cuh"
#include "common/mma.cuh"
#include "decode_attention/key_scores/code_readers.cuh"

/// Sums of rows of 4 bits, in shared memory as `IntegerKeySlice::image` lays them out, by the
/// tensor units: bytes as they were read are one operand, [16][32], and the other one, [32][8],
/// adds byte i of the words of four lanes, each with a weight, to column i or i + 4. So four lanes
/// read the rows of four lines, and sixteen bytes of each are one product. A byte holds two
/// numbers; a second product without the high one tells the sums apart.
namespace commvq::cuda::key_scores {

/// Where the rows that a lane reads lie, of the first book that it reads of a stage. Kept in shared
/// memory and read where it is used, since registers are scarce; so are `LineWeights`.
struct alignas(8) RowPlaces {
  std::uint32_t part;
  std::uint32_t factor;  ///< brings the book's code to bit 7

  /// Of lane `lane`, with rows from `rows` on, a multiple of `KeyScoresConfig::kRowAlignment`. Odd
  /// tokens read the second book first: eight lanes then meet all 32 banks.
  __device__ __forceinline__ RowPlaces(int lane, std::uint32_t rows) {
    const bool second_first = lane / 4 % 2 != 0;
    part = rows + lane % 4 * KeySlice::kNarrowLineBytes + (second_first ? 64 : 0);
    factor = second_first ? kSecond : kFirst;
  }
  /// Of the row that a stage's codes name in the i-th book, in the first group.
  __device__ __forceinline__ std::uint32_t row_address(int i, std::uint32_t codes) const {
    return (codes * (i == 0 ? factor : kFirst + kSecond - factor) & (63u << 7)) |
           (i == 0 ? part : part ^ 64);
  }

 private:
  static constexpr std::uint32_t kFirst = 128, kSecond = 2;
};

/// The lines' weights, of the first, the second and other groups, as the lanes' bytes of the
/// operand that adds up rows: column lane / 4.
using LineWeights = std::uint32_t[3][32];

/// `line_weights` is that of a `KeySlice`.
__device__ __forceinline__ std::uint32_t line_weight(const std::uint8_t* line_weights, int group,
                                                     int lane) {
  return std::uint32_t{line_weights[4 * group + lane % 4]} << (8 * (lane / 4 % 4));
}

/// The operands of a lane.
struct LaneWeights {
  std::uint32_t of[3][2];  ///< [group][first and last sixteen rows]

  __device__ __forceinline__ explicit LaneWeights(const LineWeights& weights) {
    const unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const std::uint32_t both = weights[j][lane];
      of[j][0] = lane < 16 ? both : 0;
      of[j][1] = lane < 16 ? 0 : both;
    }
  }
};

/// Sums of sixteen pairs, 16 c to 16 c + 15, of one token.
struct NarrowSums {
  int low[4] = {};  ///< of the low halves of bytes
  int all[4] = {};

  /// Adds four lanes' sixteen bytes times their lines' weights.
  __device__ __forceinline__ void add(uint4 v, const std::uint32_t (&weights)[2]) {
    constexpr std::uint32_t kLow = 0x0f0f0f0fu;
    mma_16x8x32(all, v, weights);
    mma_16x8x32(low, {v.x & kLow, v.y & kLow, v.z & kLow, v.w & kLow}, weights);
  }
  /// Real and imaginary parts of pairs 8k and on, k = 2c + i, in 512 units. An integer below 2048
  /// in the place of an fp16 number is that number times 2^-24.
  __device__ __forceinline__ void get(int i, uint2 zero, __half2& real, __half2& imag) const {
    const __half2 unit = __float2half2_rn(32768.0f);
    const std::uint32_t lows = packed(low, i);
    const std::uint32_t highs = (packed(all, i) - lows) >> 4;
    real = __hfma2(as_half2(lows), unit, as_half2(zero.x));
    imag = __hfma2(as_half2(highs), unit, as_half2(zero.y));
  }

 private:
  __device__ __forceinline__ static std::uint32_t packed(const int (&sums)[4], int i) {
    return static_cast<std::uint32_t>(sums[2 * i] + sums[2 * i + 1] * 65536);
  }
};

/// Where the rows of two of a lane's tokens lie, of one line of each of kGroups groups of four.
template <int kGroups>
class NarrowRows {
 public:
  __device__ __forceinline__ NarrowRows(const RowPlaces& places, const StageCodes<kGroups>& first,
                                        const StageCodes<kGroups>& second) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        addresses_[0][j][i] = places.row_address(i, first.of_line(j));
        addresses_[1][j][i] = places.row_address(i, second.of_line(j));
      }
  }

  /// Sixteen bytes of the first row of token t, from byte `offset` on.
  __device__ __forceinline__ uint4 first(int t, int offset) const {
    return load(t, 0, 0, offset);
  }

  /// Adds up the same bytes of every row; `first` are those of the first one.
  __device__ __forceinline__ NarrowSums sums(const LaneWeights& weights, int t, int offset,
                                             uint4 first) const {
    NarrowSums sums;
#pragma unroll
    for (int j = 0; j < kGroups; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        sums.add(i + j == 0 ? first : load(t, j, i, offset), weights.of[j < 2 ? j : 2]);
    return sums;
  }

 private:
  std::uint32_t addresses_[2][kGroups][2];  ///< [token][group][book], less the group's distance

  __device__ __forceinline__ uint4 load(int t, int group, int i, int offset) const {
    return load_shared_16<0>(addresses_[t][group][i] + offset +
                             group * 4 * KeySlice::kNarrowLineBytes);
  }
};

}  // namespace commvq::cuda::key_scores
