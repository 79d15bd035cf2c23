#pragma once

#include "common/mma.cuh"
#include "common/wgmma.cuh"
#include "decode_attention/binary/block_copy.cuh"

namespace commvq::cuda::binary_attention {

/// The sixteen codes of step `k` of a word, of two tokens (rows g and g + 8), as an operand: codes
/// 2 k and 2 k + 1 of the word's halves. Only the steps of the lower bytes are fp16 numbers that
/// entries are scaled for; the others' are shifted to theirs.
template <bool kGraded>
__device__ __forceinline__ void codes_of(std::uint32_t first, std::uint32_t second, int k,
                                         std::uint32_t (&codes)[4]) {
  constexpr int kByteSteps = kGraded ? 2 : 4;
  const int in_byte = k % kByteSteps, shift = k / kByteSteps * 8;
  // Bits of a byte: 0, 1 and 2, 3 and 4, 5 to 7; or one after the other.
  const std::uint32_t mask =
      kGraded ? (in_byte == 0 ? 0x00010001u : 0x00180018u) : 0x00010001u << (2 * in_byte);
  const std::uint32_t next = kGraded ? (in_byte == 0 ? 0x00060006u : 0x00e000e0u) : mask << 1;
  codes[0] = first >> shift & mask;
  codes[1] = second >> shift & mask;
  codes[2] = first >> shift & next;
  codes[3] = second >> shift & next;
}

/// Products of the codes of sixteen tokens, 2 `half` and 2 `half` + 1 of every lane, with columns
/// `[8 kFirst, 8 (kFirst + kCount))`.
template <class Shape, int kFirst, int kCount>
__device__ __forceinline__ void multiply_codes(const CodeOperand<Shape>& operand,
                                               const LaneCodes<Shape>& codes, int half,
                                               float (&products)[kCount][4]) {
  const auto word = [&](int token, int w) {
    return half == 0 ? codes.words[token][w] : codes.words[2 + token][w];
  };
  constexpr int kSteps = Shape::kWordEights / 2;  // of a word
#if COMMVQ_WGMMA
  const WgmmaOperand columns(shared_address(operand[kFirst]), sizeof(operand[0][0]),
                             sizeof(operand[0]));
  // A word's products at once: operands of more would take more registers than there are.
#pragma unroll
  for (int w = 0; w < Shape::kLaneWords; ++w) {
    std::uint32_t bits[kSteps][4];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      codes_of<Shape::kGraded>(word(0, w), word(1, w), k, bits[k]);
      // Not later than here.
      asm volatile("" : "+r"(bits[k][0]), "+r"(bits[k][1]), "+r"(bits[k][2]), "+r"(bits[k][3]));
    }
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
      wgmma(products, bits[k],
            columns.at((kSteps * w + k) * 2 * static_cast<int>(sizeof(operand[0][0]))), w + k > 0);
    wgmma_end(products);
  }
#else
  const int lane = threadIdx.x % 32;
  // Lane 8 i + j reads column j of matrix i: of two eights of codes of two eights of columns.
  const std::uint32_t column =
      shared_address(&operand[kFirst + lane / 16][lane / 8 % 2][lane % 8 * 4]);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
#pragma unroll
    for (float& product : products[i]) product = 0;
#pragma unroll
  for (int w = 0; w < Shape::kLaneWords; ++w) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      std::uint32_t bits[4];
      codes_of<Shape::kGraded>(word(0, w), word(1, w), k, bits);
#pragma unroll
      for (int i = 0; i < kCount; i += 2) {
        const uint4 e = load_matrices(column + i * sizeof(operand[0]) +
                                      (kSteps * w + k) * 2 * sizeof(operand[0][0]));
        mma_16x8x16(products[i], bits[0], bits[1], bits[2], bits[3], e.x, e.y);
        mma_16x8x16(products[i + 1], bits[0], bits[1], bits[2], bits[3], e.z, e.w);
      }
    }
  }
#endif
}

/// The score of two tokens' products at the nodes: the polynomial through them, at the tokens'
/// places in their tile.
__device__ __forceinline__ void add_low(const float4* weights, const float (&first)[4],
                                        const float (&second)[4], float factor,
                                        float (&scores)[2]) {
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const float4 weight = weights[t];
    scores[t] += factor * (weight.x * first[2 * t] + weight.y * first[2 * t + 1] +
                           weight.z * second[2 * t] + weight.w * second[2 * t + 1]);
  }
}

/// Turns an eight of decoded pairs by the tokens' places and adds its products with the queries.
__device__ __forceinline__ void add_high(uint4 turn, uint2 query, const float (&real_parts)[4],
                                         const float (&imag_parts)[4], float (&scores)[4]) {
  std::uint32_t operand[4];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const __half2 real = __floats2half2_rn(real_parts[2 * t], real_parts[2 * t + 1]);
    const __half2 imag = __floats2half2_rn(imag_parts[2 * t], imag_parts[2 * t + 1]);
    // Cosines and sines of two pairs.
    const __half2 c = as_half2(t == 0 ? turn.x : turn.z), s = as_half2(t == 0 ? turn.y : turn.w);
    operand[t] = as_bits(__hfma2(real, c, __hneg2(__hmul2(imag, s))));
    operand[2 + t] = as_bits(__hfma2(real, s, __hmul2(imag, c)));
  }
  mma_16x8x16(scores, operand[0], operand[1], operand[2], operand[3], query.x, query.y);
}

/// Adds what columns from 8 kFirst on give: some at once.
template <class Shape, int kFirst>
__device__ __forceinline__ void score_from(const Shared<Shape>& shared,
                                           const LaneCodes<Shape>& codes, int step, int tile,
                                           int block, int half, int lane, float (&high)[4],
                                           float (&low)[2]) {
  constexpr int kLeft = Shape::kColumns - kFirst;
  constexpr int kCount = kLeft < Shape::kColumnsAtOnce ? kLeft : Shape::kColumnsAtOnce;
  constexpr int kLow = kFirst == 0 ? Shape::kLowColumns : 0;
  constexpr int kFirstEight = (kFirst + kLow - Shape::kLowColumns) / 2;
  float products[kCount][4];
  multiply_codes<Shape, kFirst>(shared.operand(tile), codes, half, products);
  if constexpr (kLow > 0)
    add_low(&shared.node_weights[block * kBlockTokens + lane_token(lane) + 2 * half], products[0],
            products[1], shared.low_factors[lane % 4], low);
#pragma unroll
  for (int i = 0; i < (kCount - kLow) / 2; ++i)
    add_high(shared.turns[block % kTileWarps][kFirstEight + i][half][lane],
             shared.turned[tile].high[step % 2][block / kTileWarps][kFirstEight + i][lane],
             products[kLow + 2 * i], products[kLow + 2 * i + 1], high);
  if constexpr (kLeft > kCount)
    score_from<Shape, kFirst + kCount>(shared, codes, step, tile, block, half, lane, high, low);
}

/// Scores of a lane's four tokens of a block of the tile, in powers of two, for row q. `stage`
/// holds the block. Called by all warps of the tile together.
template <class Shape>
__device__ __forceinline__ void score_keys(const Shared<Shape>& shared, const Half<Shape>* stage,
                                           CodePlace code_place, int step, int tile, int block,
                                           int lane, float (&scores)[4]) {
  const LaneCodes<Shape> codes(stage, code_place, lane);
  float norms[4];
  widen(stage[lane_token(lane) / 16].norms + lane_token(lane) % 16, norms);
  const float high_factor = shared.high_factors[lane % 4];
#pragma unroll Shape::kHalvesAtOnce
  for (int half = 0; half < 2; ++half) {
    float low[2] = {}, high[4] = {};
    score_from<Shape, 0>(shared, codes, step, tile, block, half, lane, high, low);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const float score = high[2 * t] * high_factor + low[t];
      if (half == 0) {
        scores[t] = score * norms[t];
      } else {
        scores[2 + t] = score * norms[2 + t];
      }
    }
  }
}

}  // namespace commvq::cuda::binary_attention
