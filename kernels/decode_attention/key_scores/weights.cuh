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
  int token;         ///< a lane's first token, in the sequence; the others are 8, 16 and 24 later
  bool wholly_seen;  ///< every query sees all of them
};

/// Row of a tile whose scores lane 4g + q gathers: products leave it with rows 2 (q % 2) and the
/// next for one token.
__device__ __forceinline__ int tile_row() {
  const int q = threadIdx.x % 4;
  return q % 2 * 2 + q / 2;
}

/// Scores of a lane's tokens for one row to weights and their sum in the workspace. `scales` are
/// the tokens' value scales, of which those below 2^-100 bound no weight; `call_row` is the row of
/// the call.
__device__ __forceinline__ void store_weights(const Problem& p, const Block& block,
                                              float (&scores)[4], float (&scales)[4], int lag,
                                              int call_row, bool is_row) {
  const int g = threadIdx.x % 32 / 4;
  if (p.soft_cap > 0)
#pragma unroll
    for (float& score : scores) score = capped(score, p.soft_cap);
  if (!block.wholly_seen) hide_unseen<8>(p, block.seq, block.token, lag, scores, scales);
  float largest = -INFINITY;
#pragma unroll
  for (int t = 0; t < 4; ++t)
    largest = fmaxf(largest, scores[t] + log2_approx(fmaxf(scales[t], kLeastScale)));
#pragma unroll
  for (int step = 4; step < 32; step *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  const float reference = fmaxf(largest, -1e30f);
  float sum = 0;
  const float factor = value_sums::weight_factor(g);
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    scores[t] = exp2_approx(scores[t] - reference);
    sum += scores[t];
    // A scale that is NaN, of a token that could not be coded, shows.
    scores[t] *= scales[t] * factor;
  }
#pragma unroll
  for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (!is_row) return;
  std::uint32_t* const weights =
      p.weights + (Index{block.index} * p.row_stride + call_row) * 16 + g;
  weights[0] = as_bits(__floats2half2_rn(scores[0], scores[2]));
  weights[8] = as_bits(__floats2half2_rn(scores[1], scores[3]));
  if (g == 0) p.block_sums[Index{block.index} * p.row_stride + call_row] = {largest, sum};
}

/// Adds what other slices found to the scores of a lane's tokens.
__device__ __forceinline__ void add_slices(const Problem& p, Turn turn, const Block& block,
                                           int call_row, float (&scores)[4]) {
  float* const raw = p.raw_scores + (Index{block.index} * p.row_stride + call_row) * kBlockTokens +
                     threadIdx.x % 32 / 4;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    if (turn != Turn::kFirst) scores[t] += raw[8 * t];
    if (turn != Turn::kLast) raw[8 * t] = scores[t];
  }
}

/// Products of a block to weights or, with other slices to come, raw scores.
template <int kTiles>
__device__ __forceinline__ void score_block(const Arguments& a, const Block& block,
                                            const LaneProducts<kTiles>& products,
                                            const std::uint16_t (&norms)[4],
                                            const std::uint16_t (&scales)[4], const float* factors,
                                            const int* lags, const Place& place) {
  const Problem& p = a.problem;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile * Config::kTileRows >= place.rows) break;
    const int row = tile * Config::kTileRows + tile_row();
    const bool is_row = row < place.rows;
    const int call_row = place.head * p.rows_per_head + place.first_row + row;
    float scores[4];
#pragma unroll
    for (int t = 0; t < 4; ++t)
      scores[t] = products[tile][t] * (bf16_to_float(norms[t]) * factors[row]);
    if (a.turn != Turn::kOnly) {
      if (is_row) add_slices(p, a.turn, block, call_row, scores);
      if (a.turn != Turn::kLast) continue;
    }
    float row_scales[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) row_scales[t] = bf16_to_float(scales[t]);
    store_weights(p, block, scores, row_scales, lags[row], call_row, is_row);
  }
}

}  // namespace commvq::cuda::key_scores
