#pragma once

#include "decode_attention/exact_share.cuh"
#include "decode_attention/exact_tokens.cuh"

namespace commvq::cuda {

/// The exact items, a query token, KV head and piece of the tokens each, of thread block `block` of
/// this launch.
template <int kThreads>
__device__ inline void run_exact_items(const Problem& p, int block, std::uint8_t* memory) {
  const int items = p.num_kv_heads * p.batch * p.num_query_tokens * p.num_exact_pieces;
  const int coded_tokens = coded_tokens_of_part(p);
  const int exact_tokens = (p.window + p.exact.sinks + p.num_exact_pieces - 1) / p.num_exact_pieces;
  const int free_items = coded_tokens / (p.exact_cost * exact_tokens + 1) + 1;
  const ExactShare share(p, block, items, free_items);
#pragma unroll 1
  for (int item = share.first; item < share.end; item += share.stride) {
    __syncthreads();  // shared memory served something else before
    const int piece = item / p.num_kv_heads % p.num_exact_pieces;
    const int token = item / (p.num_kv_heads * p.num_exact_pieces);
    exact_tokens::run<kThreads>(
        p, {token / p.num_query_tokens, token % p.num_query_tokens, item % p.num_kv_heads, piece},
        memory);
  }
}

}  // namespace commvq::cuda
