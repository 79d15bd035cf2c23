#pragma once

#include "common/mma.cuh"
#include "decode_attention/binary/block_copy.cuh"

namespace commvq::cuda::binary_attention {

/// Sixteen bits of the keys of tokens 2m and 2m + 1 as an operand: bits 2 k, 2 k + 1 of the words'
/// halves.
__device__ __forceinline__ void bits_of(const std::uint32_t (&words)[4], int k, int m,
                                        std::uint32_t (&bits)[4]) {
  const std::uint32_t mask = 0x00010001u << (2 * k);
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    bits[t] = words[2 * m + t] & mask;
    bits[2 + t] = words[2 * m + t] & mask << 1;
  }
}

/// Decodes eights of pairs `[kFirst, kFirst + kCount)`, turns them and adds their products with the
/// queries to `scores`, and if asked for the products of the other pairs at the nodes.
template <class Shape, int kFirst, int kCount, bool kWithLow>
__device__ __forceinline__ void multiply_keys(const Shared<Shape>& shared,
                                              const LaneCodes<Shape>& codes, int step, int tile,
                                              int block, float (&scores)[2][4],
                                              float (&low)[2][2][4]) {
  const int lane = threadIdx.x % 32;
  const TileBuffers<Shape>& buffers = shared.tiles[tile];
  float keys[kCount][2][2][4] = {};  // [eight][real, imaginary][tokens]
#pragma unroll
  for (int w = 0; w < Shape::kLaneWords; ++w) {
    std::uint32_t words[4] = {codes.words[0][w], codes.words[1][w], codes.words[2][w],
                              codes.words[3][w]};
    // Operands of all steps, read ahead, would take more registers than there are.
#pragma unroll 1
    for (int byte = 2 * w; byte < 2 * w + 2; ++byte) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        std::uint32_t bits[2][4];
        bits_of(words, k, 0, bits[0]);
        bits_of(words, k, 1, bits[1]);
        if constexpr (kWithLow) {
          const uint4 b = buffers.low_products[step % 3][4 * byte + k][slot_of(k, lane)];
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            mma_16x8x16(low[m][0], bits[m][0], bits[m][1], bits[m][2], bits[m][3], b.x, b.y);
            mma_16x8x16(low[m][1], bits[m][0], bits[m][1], bits[m][2], bits[m][3], b.z, b.w);
          }
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const uint4 e = shared.high_entries[4 * byte + k][kFirst + i][lane];
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            mma_16x8x16(keys[i][0][m], bits[m][0], bits[m][1], bits[m][2], bits[m][3], e.x, e.y);
            mma_16x8x16(keys[i][1][m], bits[m][0], bits[m][1], bits[m][2], bits[m][3], e.z, e.w);
          }
        }
      }
#pragma unroll
      for (std::uint32_t& word : words) word >>= 8;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint2 query = buffers.high_queries[step % 4][kFirst + i][lane];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      // Cosines and sines of two pairs: of token 2m, then of token 2m + 1.
      const uint4 turn = shared.turns[block][kFirst + i][m][lane];
      std::uint32_t operand[4];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const __half2 real = __floats2half2_rn(keys[i][0][m][2 * t], keys[i][0][m][2 * t + 1]);
        const __half2 imag = __floats2half2_rn(keys[i][1][m][2 * t], keys[i][1][m][2 * t + 1]);
        const __half2 c = as_half2(t == 0 ? turn.x : turn.z),
                      s = as_half2(t == 0 ? turn.y : turn.w);
        operand[t] = as_bits(__hfma2(real, c, __hneg2(__hmul2(imag, s))));
        operand[2 + t] = as_bits(__hfma2(real, s, __hmul2(imag, c)));
      }
      mma_16x8x16(scores[m], operand[0], operand[1], operand[2], operand[3], query.x, query.y);
    }
  }
}

/// All pairs from eight `kFirst` on, some at once: as many as there are registers for.
template <class Shape, int kFirst>
__device__ __forceinline__ void multiply_from(const Shared<Shape>& shared,
                                              const LaneCodes<Shape>& codes, int step, int tile,
                                              int block, float (&scores)[2][4],
                                              float (&low)[2][2][4]) {
  constexpr int kLeft = Shape::kHighEights - kFirst;
  constexpr int kCount = kLeft < Shape::kEightsAtOnce ? kLeft : Shape::kEightsAtOnce;
  multiply_keys<Shape, kFirst, kCount, kFirst == 0 && (Shape::kLowEights > 0)>(
      shared, codes, step, tile, block, scores, low);
  if constexpr (kLeft > kCount)
    multiply_from<Shape, kFirst + kCount>(shared, codes, step, tile, block, scores, low);
}

/// Scores of a lane's four tokens of a block of the tile, in powers of two, for row q. `stage`
/// holds the block.
template <class Shape>
__device__ __forceinline__ void score_keys(const Shared<Shape>& shared, const Half<Shape>* stage,
                                           int step, int tile, int block, float (&scores)[4]) {
  float low[2][2][4] = {}, high[2][4] = {};
  const LaneCodes<Shape> codes(stage);
  multiply_from<Shape, 0>(shared, codes, step, tile, block, high, low);
  const int place = block * kBlockTokens + lane_token();
  float norms[4];
  widen(stage[lane_token() / 16].norms + lane_token() % 16, norms);
  const float low_factor = shared.low_factors[threadIdx.x % 4];
  const float high_factor = shared.high_factors[threadIdx.x % 4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int m = t / 2, at = t % 2 * 2;
    float score = high[m][at] * high_factor;
    if constexpr (Shape::kLowEights > 0) {
      const float4 weight = shared.node_weights[place + t];
      const float sum = weight.x * low[m][0][at] + weight.y * low[m][0][at + 1] +
                        weight.z * low[m][1][at] + weight.w * low[m][1][at + 1];
      score += sum * low_factor;
    }
    scores[t] = score * norms[t];
  }
}

}  // namespace commvq::cuda::binary_attention
