#pragma once

#include "decode_attention/exact_tokens.cuh"

namespace commvq::cuda {

/// For the combination, which counts the blocks that are done: by the first kernel of a call.
template <int kThreads>
__device__ __forceinline__ void clear_counters(const Problem& p) {
  if (blockIdx.x > 0 || blockIdx.y > 0) return;
  for (int i = threadIdx.x; i < p.num_counters; i += kThreads) p.counters[i] = 0;
}

/// The exact items, a query token, KV head and piece of the tokens each, of thread block `block` of
/// this launch. The blocks that score no keys take what they can in the time that the others need
/// for theirs; the rest is shared out evenly.
template <int kThreads>
__device__ inline void run_exact_items(const Problem& p, int block, std::uint8_t* memory) {
  const int scoring = p.num_kv_heads * p.num_key_parts;
  const int items = p.num_kv_heads * p.batch * p.num_query_tokens * p.num_exact_pieces;
  const int coded_tokens = total_blocks(p) / p.num_key_parts * kBlockTokens;
  const int exact_tokens = (p.window + p.exact.sinks + p.num_exact_pieces - 1) / p.num_exact_pieces;
  const int free_items = coded_tokens / (p.exact_cost * exact_tokens + 1) + 1;
  const int taken = min(items, p.num_exact_blocks * free_items);
  const bool scores_keys = block < scoring;
  const int first = scores_keys ? taken + block : block - scoring;
  const int end = scores_keys ? items : taken;
  const int stride = scores_keys ? scoring : p.num_exact_blocks;
#pragma unroll 1
  for (int item = first; item < end; item += stride) {
    __syncthreads();  // shared memory served something else before
    const int piece = item / p.num_kv_heads % p.num_exact_pieces;
    const int token = item / (p.num_kv_heads * p.num_exact_pieces);
    exact_tokens::run<kThreads>(
        p, {token / p.num_query_tokens, token % p.num_query_tokens, item % p.num_kv_heads, piece},
        memory);
  }
}

}  // namespace commvq::cuda
