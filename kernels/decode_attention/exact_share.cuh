#pragma once

#include "decode_attention/problem.cuh"

namespace commvq::cuda {

/// Coded tokens that a thread block scores.
__device__ inline int coded_tokens_of_part(const Problem& p) {
  return total_blocks(p) / p.num_key_parts * kBlockTokens;
}

/// The items of the exact tokens that fall to thread block `block` of a launch: of `items`, those
/// from `first` to `end` that are `stride` apart. The blocks that score no keys take `free_items`
/// each, what they can in the time that the others need for their keys; the rest is shared out
/// evenly.
struct ExactShare {
  int first, end, stride;

  __device__ ExactShare(const Problem& p, int block, int items, int free_items) {
    const int scoring = p.num_kv_heads * p.num_key_parts;
    const int taken = min(items, p.num_exact_blocks * free_items);
    const bool scores_keys = block < scoring;
    first = scores_keys ? taken + block : block - scoring;
    end = scores_keys ? items : taken;
    stride = scores_keys ? scoring : p.num_exact_blocks;
  }
};

}  // namespace commvq::cuda
