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

/// Products of the codes of sixteen tokens, 2 `half` and 2 `half` + 1 of every lane: with e^T q,
/// and with the entries of pairs that are decoded, summed up in fp16 unless these are all pairs.
template <class Shape>
struct Products {
  static constexpr bool kHasLow = Shape::kLowEights > 0;
  using High = std::conditional_t<kHasLow, std::uint32_t[2], float[4]>;
  float low[2][4];
  High high[2 * Shape::kHighEights];
};

/// Two neighbouring columns of row g, or g + 8, of an eight of products.
__device__ __forceinline__ __half2 columns_of(const std::uint32_t (&eight)[2], int row) {
  return as_half2(eight[row]);
}
__device__ __forceinline__ __half2 columns_of(const float (&eight)[4], int row) {
  return __floats2half2_rn(eight[2 * row], eight[2 * row + 1]);
}

/// Multiplies the codes of sixteen tokens.
template <class Shape>
__device__ __forceinline__ void multiply_codes(const Shared<Shape>& shared,
                                               const CodeOperand<Shape, 2>& low,
                                               const LaneCodes<Shape>& codes, int half,
                                               Products<Shape>& products) {
  const auto word = [&](int token, int w) { return codes.words[2 * half + token][w]; };
  constexpr int kSteps = Shape::kWordEights / 2;  // of a word
  constexpr int kStepBytes = 2 * static_cast<int>(sizeof(low[0][0]));
#if COMMVQ_WGMMA
  constexpr int kColumnBytes = static_cast<int>(sizeof(low[0]));
  const WgmmaOperand low_columns(shared_address(low), kStepBytes / 2, kColumnBytes);
  const WgmmaOperand high_columns(shared_address(shared.high_entries), kStepBytes / 2,
                                  kColumnBytes);
  // Some products at once: operands of more would take more registers than there are.
  constexpr int kAtOnce = 4;
#pragma unroll
  for (int first = 0; first < kSteps * Shape::kLaneWords; first += kAtOnce) {
    std::uint32_t bits[kAtOnce][4];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int w = (first + i) / kSteps;
      codes_of<Shape::kGraded>(word(0, w), word(1, w), (first + i) % kSteps, bits[i]);
      // Not later than here.
      asm volatile("" : "+r"(bits[i][0]), "+r"(bits[i][1]), "+r"(bits[i][2]), "+r"(bits[i][3]));
    }
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int offset = (first + i) * kStepBytes;
      if constexpr (Products<Shape>::kHasLow)
        wgmma(products.low, bits[i], low_columns.at(offset), first + i > 0);
      wgmma(products.high, bits[i], high_columns.at(offset), first + i > 0);
    }
    wgmma_commit();
    wgmma_wait<0>(products.high);
    if constexpr (Products<Shape>::kHasLow) wgmma_wait<0>(products.low);
  }
#else
  const int lane = threadIdx.x % 32;
  // Lane 8 i + j reads column j of matrix i: of two eights of codes of two eights of columns.
  const auto place_of = [&](const auto& operand) {
    return shared_address(&operand[lane / 16][lane / 8 % 2][lane % 8 * 4]);
  };
  const std::uint32_t low_place = place_of(low), high_place = place_of(shared.high_entries);
  products = {};
#pragma unroll
  for (int step = 0; step < kSteps * Shape::kLaneWords; ++step) {
    std::uint32_t bits[4];
    codes_of<Shape::kGraded>(word(0, step / kSteps), word(1, step / kSteps), step % kSteps, bits);
    const auto multiply = [&](auto& two, std::uint32_t place, int i) {
      const uint4 e = load_matrices(place + i * sizeof(low[0]) + step * kStepBytes);
      mma_16x8x16(two[i], bits[0], bits[1], bits[2], bits[3], e.x, e.y);
      mma_16x8x16(two[i + 1], bits[0], bits[1], bits[2], bits[3], e.z, e.w);
    };
    if constexpr (Products<Shape>::kHasLow) multiply(products.low, low_place, 0);
#pragma unroll
    for (int i = 0; i < 2 * Shape::kHighEights; i += 2) multiply(products.high, high_place, i);
  }
#endif
}

/// The scores of two tokens' products at the nodes: the polynomials through them, at the tokens'
/// places in their tile.
__device__ __forceinline__ void add_low(const float4* weights, const float (&products)[2][4],
                                        float factor, float (&scores)[2]) {
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const float4 weight = weights[t];
    scores[t] += factor * (weight.x * products[0][2 * t] + weight.y * products[0][2 * t + 1] +
                           weight.z * products[1][2 * t] + weight.w * products[1][2 * t + 1]);
  }
}

/// Turns an eight of decoded pairs by the tokens' places and adds its products with the queries.
template <class Eight>
__device__ __forceinline__ void add_high(uint4 turn, uint2 query, const Eight& real_parts,
                                         const Eight& imag_parts, float (&scores)[4]) {
  std::uint32_t operand[4];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const __half2 real = columns_of(real_parts, t), imag = columns_of(imag_parts, t);
    // Cosines and sines of two pairs.
    const __half2 c = as_half2(t == 0 ? turn.x : turn.z), s = as_half2(t == 0 ? turn.y : turn.w);
    operand[t] = as_bits(__hfma2(real, c, __hneg2(__hmul2(imag, s))));
    operand[2 + t] = as_bits(__hfma2(real, s, __hmul2(imag, c)));
  }
  mma_16x8x16(scores, operand[0], operand[1], operand[2], operand[3], query.x, query.y);
}

/// Scores of a lane's four tokens of a block of a tile, in powers of two, for row q. `stage` holds
/// the block; the tile is that of step `step` of a group. Called by all warps of the tile together.
template <class Shape>
__device__ __forceinline__ void score_keys(const Shared<Shape>& shared, const Half<Shape>* stage,
                                           const LaneCodes<Shape>& codes, int step, int tile,
                                           int block, int lane, float (&scores)[4]) {
  const TurnedQueries<Shape>& turned = shared.turned[tile];
  float norms[4];
  widen(stage[lane_token(lane) / 16].norms + lane_token(lane) % 16, norms);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Products<Shape> products;
    multiply_codes(shared, turned.low[Products<Shape>::kHasLow ? step : 0], codes, half, products);
    float low[2] = {}, high[4] = {};
    if constexpr (Products<Shape>::kHasLow)
      add_low(&shared.node_weights[block * kBlockTokens + lane_token(lane) + 2 * half],
              products.low, shared.low_factors[lane % 4], low);
#pragma unroll
    for (int i = 0; i < Shape::kHighEights; ++i)
      add_high(shared.turns[block % kTileWarps][i][half][lane],
               turned.high[step][block / kTileWarps][i][lane / 8 * 4 + lane % 4],
               products.high[2 * i], products.high[2 * i + 1], high);
#pragma unroll
    for (int t = 0; t < 2; ++t)
      scores[2 * half + t] =
          (high[2 * t] * shared.high_factors[lane % 4] + low[t]) * norms[2 * half + t];
  }
}

}  // namespace commvq::cuda::binary_attention
