#pragma once

#include "common/memory.cuh"
#include "common/mma.cuh"
#include "decode_attention/key_scores/products.cuh"
#include "decode_attention/key_scores/shared.cuh"
#include "decode_attention/scores.cuh"
#include "decode_attention/value_sums.cuh"

/// Products with the queries to scores, and these to weights of the values.
namespace commvq::cuda::key_scores {

/// A warp's block of tokens.
struct Block {
  int seq;
  int index;         ///< in the workspace
  int token;         ///< the first of a lane's four, in the sequence
  bool wholly_seen;  ///< every query sees all of them
};

/// Row of a tile whose scores lane 4g + q gathers: products leave it with rows 2 (q % 2) and the
/// next for one token.
__device__ __forceinline__ int tile_row() {
  const int q = threadIdx.x % 4;
  return q % 2 * 2 + q / 2;
}

/// Pairs of numbers of tokens s and s + 16 from those of a lane's four tokens: of two of them in
/// lanes of tokens below 16, of the other two in the lanes of their partners.
__device__ __forceinline__ uint2 paired_with_sixteen_later(uint2 of_tokens) {
  const bool is_later = threadIdx.x % 32 >= 16;
  const std::uint32_t other = __shfl_xor_sync(~0u, is_later ? of_tokens.x : of_tokens.y, 16);
  const std::uint32_t first = is_later ? other : of_tokens.x;
  const std::uint32_t later = is_later ? of_tokens.y : other;
  return {__byte_perm(first, later, 0x5410), __byte_perm(first, later, 0x7632)};
}

/// Scores of a lane's tokens for one row to weights and their sum in the workspace. `scales` are
/// the tokens' value scales, of which those below 2^-100 bound no weight; `call_row` is the row of
/// the call.
__device__ __forceinline__ void store_weights(const Problem& p, const Block& block,
                                              float (&scores)[4], float (&scales)[4], int lag,
                                              int call_row, bool is_row) {
  if (p.soft_cap > 0)
#pragma unroll
    for (float& score : scores) score = capped(score, p.soft_cap);
  if (!block.wholly_seen) hide_unseen(p, block.seq, block.token, lag, scores, scales);
  float largest = -INFINITY;
#pragma unroll
  for (int t = 0; t < 4; ++t)
    largest = fmaxf(largest, scores[t] + log2_approx(fmaxf(scales[t], kLeastScale)));
#pragma unroll
  for (int step = 4; step < 32; step *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  const float reference = fmaxf(largest, -1e30f);
  float sum = 0;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    scores[t] = exp2_approx(scores[t] - reference);
    sum += scores[t];
    // A scale that is NaN, of a token that could not be coded, shows.
    scores[t] *= scales[t] * value_sums::weight_factor(t);
  }
#pragma unroll
  for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  const uint2 weights =
      paired_with_sixteen_later({as_bits(__floats2half2_rn(scores[0], scores[1])),
                                 as_bits(__floats2half2_rn(scores[2], scores[3]))});
  if (!is_row) return;
  const int lane = threadIdx.x % 32;
  std::uint32_t* const row = p.weights + (Index{block.index} * p.row_stride + call_row) * 16;
  *reinterpret_cast<uint2*>(row + lane % 16 / 4 * 4 + lane / 16 * 2) = weights;
  if (lane < 4) p.block_sums[Index{block.index} * p.row_stride + call_row] = {largest, sum};
}

/// Adds what other slices found to the scores of a lane's tokens.
__device__ __forceinline__ void add_slices(const Problem& p, Turn turn, const Block& block,
                                           int call_row, float (&scores)[4]) {
  auto* const raw = reinterpret_cast<float4*>(
      p.raw_scores + (Index{block.index} * p.row_stride + call_row) * kBlockTokens +
      threadIdx.x % 32 / 4 * 4);
  if (turn != Turn::kFirst) {
    const float4 others = *raw;
    scores[0] += others.x, scores[1] += others.y, scores[2] += others.z, scores[3] += others.w;
  }
  if (turn != Turn::kLast) *raw = make_float4(scores[0], scores[1], scores[2], scores[3]);
}

/// The t-th of four bf16 numbers.
__device__ __forceinline__ float bf16_of(uint2 numbers, int t) {
  const float2 two = bf16_to_floats(t < 2 ? numbers.x : numbers.y);
  return t % 2 == 0 ? two.x : two.y;
}

/// Products of a block to weights or, with other slices to come, raw scores.
template <int kTiles>
__device__ __forceinline__ void score_block(const Arguments& a, const Block& block,
                                            const LaneProducts<kTiles>& products, uint2 norms,
                                            uint2 scales, const float* factors, const int* lags,
                                            const Place& place) {
  const Problem& p = a.problem;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile * Config::kTileRows >= place.rows) break;
    const int row = tile * Config::kTileRows + tile_row();
    const bool is_row = row < place.rows;
    const int call_row = place.head * p.rows_per_head + place.first_row + row;
    float scores[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) scores[t] = products[tile][t] * (bf16_of(norms, t) * factors[row]);
    if (a.turn != Turn::kOnly) {
      if (is_row) add_slices(p, a.turn, block, call_row, scores);
      if (a.turn != Turn::kLast) continue;
    }
    float row_scales[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) row_scales[t] = bf16_of(scales, t);
    store_weights(p, block, scores, row_scales, lags[row], call_row, is_row);
  }
}

}  // namespace commvq::cuda::key_scores
