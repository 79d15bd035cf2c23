#pragma once

#include "common/memory.cuh"
#include "decode_attention/problem.cuh"

/// What both kernels that score keys do with their scores.
namespace commvq::cuda {

/// Scales of values below it, 2^-100, bound no weight.
constexpr float kLeastScale = 7.8886090522101181e-31f;

/// cap * tanh(score / cap).
__device__ __forceinline__ float capped(float score, float cap) {
  const float grown = exp2_approx(__fdividef(score, cap) * 2.88539008177792681f);
  return cap - __fdividef(2 * cap, 1 + grown);
}

/// Takes out the scores of tokens that the row's query does not see: a lane's four in a row.
__device__ __forceinline__ void hide_unseen(const Problem& p, int seq, int first_token, int lag,
                                            float (&scores)[4], float (&scales)[4]) {
  const Sequence sequence(p, seq);
  const int position = sequence.length - 1 - lag;
  const int begin = sequence.coded_begin(p, position), end = sequence.coded_end(p, position);
#pragma unroll
  for (int t = 0; t < 4; ++t)
    // What was read of tokens that nobody sees may be anything.
    if (first_token + t < begin || first_token + t >= end) scores[t] = -INFINITY, scales[t] = 0;
}

}  // namespace commvq::cuda
