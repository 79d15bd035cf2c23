#pragma once

#include "common/memory.cuh"
#include "common/mma.cuh"
#include "decode_attention/binary/shape.cuh"
#include "decode_attention/scores.cuh"

namespace commvq::cuda::binary_attention {

/// Transposes an 8 x 8 matrix of 16-bit numbers: lane 4g + q holds row g, columns 2q and 2q + 1.
__device__ __forceinline__ std::uint32_t transposed(std::uint32_t fragment) {
  std::uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(result) : "r"(fragment));
  return result;
}

/// What a warp has gathered: lane 4g + q holds row q's largest score and a share of its sum, and
/// some sums of the values: of bits from 16 kLaneWords g on, fours after each other, bits 0, 2, 1
/// and 3; or of the numbers of bytes 2 g and 2 g + 1 of sixteen, see `add_numbers`.
template <class Shape>
struct Gathered {
  static constexpr int kFours = Shape::kValueSums / 32;

  float largest = -INFINITY;
  float sum = 0;
  float values[kFours][4] = {};
};

/// The weights of a later score may exceed those of the largest so far by 2^kSlack before all sums
/// are rescaled; fp16 holds 2^kSlack * 2^7.
constexpr float kSlack = 8;

/// Scores to weights, as operands of the products with the bits of values: tokens s and s + 16 in
/// one register, s = 4 q + t, for columns 2 row and 2 row + 1, times 2^7 or, where a bit's place
/// follows from its token, 2^(7 - s % 8).
template <class Shape>
__device__ __forceinline__ void weigh(float (&scores)[4], const float (&scales)[4], int lane,
                                      Gathered<Shape>& gathered, std::uint32_t (&weights)[4]) {
  float largest = -INFINITY;
#pragma unroll
  for (int t = 0; t < 4; ++t)
    largest = fmaxf(largest, scores[t] + log2_approx(fmaxf(scales[t], kLeastScale)));
  if (__any_sync(~0u, largest > gathered.largest + kSlack)) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    if (largest > gathered.largest) {
      const float keep = exp2_approx(gathered.largest - largest);
      gathered.largest = largest;
      gathered.sum *= keep;
#pragma unroll
      for (auto& four : gathered.values)
#pragma unroll
        for (float& value : four) value *= keep;
    }
  }
  const float reference = fmaxf(gathered.largest, -1e30f);
  const float factor = Shape::kGraded || lane % 16 < 8 ? 128.0f : 8.0f;  // 4 (g / 2) % 8 is 0 or 4
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float weight = exp2_approx(scores[t] - reference);
    gathered.sum += weight;
    // A scale that is NaN, of a token that could not be coded, shows.
    const float scaled =
        weight * scales[t] * (Shape::kGraded ? factor : factor / static_cast<float>(1 << t));
    weights[t] = transposed(as_bits(__floats2half2_rn(scaled, scaled)));
  }
}

/// Weights as operands of a product that takes two sets of sixteen bits or numbers of the same
/// eight tokens: the first one's sums are its even columns, the second one's the odd ones.
struct ColumnWeights {
  std::uint32_t even[4], odd[4];

  __device__ __forceinline__ ColumnWeights(const std::uint32_t (&weights)[4], int column) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      even[t] = column % 2 == 0 ? weights[t] : 0;
      odd[t] = column % 2 == 0 ? 0 : weights[t];
    }
  }
};

/// Adds weights times bits of the values. Lane 4g + q holds bits 16 kLaneWords g and those after
/// it, of tokens 4 q to 4 q + 3 of either half: in one byte of the words.
template <class Shape>
__device__ __forceinline__ void add_bits(const Half<Shape>* stage,
                                         const std::uint32_t (&weights)[4], int lane,
                                         Gathered<Shape>& gathered) {
  const int g = lane / 4, q = lane % 4;
  const std::uint32_t select_first = q < 2 ? 0x5410 : 0x5511,
                      select_second = q < 2 ? 0x7632 : 0x7733;
  const std::uint32_t lane_mask = 0x00010001u << (q % 2 * 4);
  const ColumnWeights columns(weights, g);
#pragma unroll
  for (int vector = 0; vector < 2 * Shape::kLaneWords; ++vector) {
    const int bit = g * (16 * Shape::kLaneWords) + vector * 8;
    const uint4 low = *reinterpret_cast<const uint4*>(stage[0].values + bit);
    const uint4 high = *reinterpret_cast<const uint4*>(stage[1].values + bit);
    const std::uint32_t lows[4] = {low.x, low.y, low.z, low.w};
    const std::uint32_t highs[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      std::uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        words[2 * j] = __byte_perm(lows[i + j], highs[i + j], select_first);
        words[2 * j + 1] = __byte_perm(lows[i + j], highs[i + j], select_second);
      }
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const std::uint32_t mask = lane_mask << t;
        mma_16x8x16(gathered.values[2 * vector + i / 2], words[0] & mask, words[1] & mask,
                    words[2] & mask, words[3] & mask, columns.even[t], columns.odd[t]);
      }
    }
  }
}

/// Adds weights times numbers of the values. Lane 4g + q reads sixteen bits of tokens 4 q to 4 q +
/// 3 of either half, two bytes of four numbers each, whose masks leave fp16 numbers of different
/// units: sums of the byte's numbers 3, 1, 2 and 0 are in units of 1, 2^3, 2 and 2^5.
template <class Shape>
__device__ __forceinline__ void add_numbers(const Half<Shape>* stage,
                                            const std::uint32_t (&weights)[4], int lane,
                                            Gathered<Shape>& gathered) {
  const int g = lane / 4, q = lane % 4;
  const ColumnWeights columns(weights, g);
#pragma unroll
  for (int word = 0; word < Shape::kLaneWords; ++word) {
    const int first = (8 * word + g) * 16 + 4 * q;
    const uint2 low = *reinterpret_cast<const uint2*>(stage[0].values + first);
    const uint2 high = *reinterpret_cast<const uint2*>(stage[1].values + first);
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int byte = 0; byte < 2; ++byte) {
        const std::uint32_t select = (byte == 0 ? 0x5410 : 0x5511) + (t % 2 == 0 ? 0 : 0x2222);
        const std::uint32_t two =
            __byte_perm(t < 2 ? low.x : low.y, t < 2 ? high.x : high.y, select);
        mma_16x8x16(gathered.values[2 * word + byte], two & 0x00010001u, two & 0x00060006u,
                    two & 0x00180018u, two & 0x00e000e0u, columns.even[t], columns.odd[t]);
      }
  }
}

/// Writes a warp's sums of row q, in units of 2^-17.
template <class Shape>
__device__ __forceinline__ void store_sums(const Gathered<Shape>& gathered, int g, float* outputs) {
#pragma unroll
  for (int i = 0; i < Gathered<Shape>::kFours; ++i) {
    const float(&four)[4] = gathered.values[i];
    if constexpr (Shape::kGraded) {
      // The later byte of a word is the code's earlier one.
      const int byte = 2 * (8 * (i / 2) + g) + 1 - i % 2;
      *reinterpret_cast<float4*>(outputs + 4 * byte) =
          make_float4(four[3] / 32, four[1] / 8, four[2] / 2, four[0]);
    } else {
      *reinterpret_cast<float4*>(outputs + g * (4 * Gathered<Shape>::kFours) + 4 * i) =
          make_float4(four[0], four[2], four[1], four[3]);
    }
  }
}

/// Merges what the warps gathered and writes it as part `slot`.
template <class Shape>
__device__ __forceinline__ void store(const Problem& p, Shared<Shape>& shared, Index slot, int head,
                                      int first_row, int rows, Gathered<Shape>& gathered) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int step = 4; step < 32; step *= 2) gathered.sum += __shfl_xor_sync(~0u, gathered.sum, step);
  __syncthreads();  // the blocks' memory serves the outputs now
  if (g == 0) shared.sums[warp][q] = {gathered.largest, gathered.sum};
  store_sums(gathered, g, shared.outputs[warp][q]);
  __syncthreads();
#pragma unroll 1
  for (int item = threadIdx.x; item < rows * Shape::kValueSums; item += Shape::kThreads) {
    const int row = item / Shape::kValueSums, number = item % Shape::kValueSums;
    float largest = -INFINITY, sum = 0, value = 0;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) largest = fmaxf(largest, shared.sums[w][row].max);
#pragma unroll 4
    for (int w = 0; w < Shape::kWarps; ++w) {
      const RowSum part = shared.sums[w][row];
      const float factor = part.max == -INFINITY ? 0.0f : exp2_approx(part.max - largest);
      sum += part.sum * factor;
      if (factor > 0) value += shared.outputs[w][row][number] * factor;
    }
    const int call_row = head * p.rows_per_head + first_row + row;
    p.value_sums[(slot * p.row_stride + call_row) * p.num_sums + head * Shape::kValueSums +
                 number] = value * 131072.0f;
    if (number == 0) p.part_sums[slot * p.row_stride + call_row] = {largest, sum};
  }
  __syncthreads();
}

}  // namespace commvq::cuda::binary_attention
