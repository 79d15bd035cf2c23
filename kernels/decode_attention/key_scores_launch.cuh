#pragma once

#include "common/launch.cuh"
#include "decode_attention/exact_tokens.cuh"
#include "decode_attention/kernels.cuh"

namespace commvq::cuda {

/// The exact items, a query token, KV head and piece of the tokens each, of thread block `block` of
/// this launch. The blocks that score no keys take what they can in the time that the others need
/// for theirs; the rest is shared out evenly.
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
    exact_tokens::run(
        p, {token / p.num_query_tokens, token % p.num_query_tokens, item % p.num_kv_heads, piece},
        memory);
  }
}

/// Thread blocks (part and head, block of rows) score coded keys; in the first slice they and
/// num_exact_blocks others also attend over the exact tokens.
template <int kWidth, class Reader, int kRowBits, int kPlanes>
__global__ void __launch_bounds__(KeyScoresConfig::kThreads, 1)
    key_scores_kernel(const __grid_constant__ key_scores::Arguments arguments) {
  extern __shared__ __align__(128) std::uint8_t shared_memory[];
  const Problem& problem = arguments.problem;
  let_next_kernel_start();
  const int block = static_cast<int>(blockIdx.x);
  const bool first_slice =
      arguments.turn == key_scores::Turn::kOnly || arguments.turn == key_scores::Turn::kFirst;
  if (first_slice && block == 0 && blockIdx.y == 0)
    for (int i = threadIdx.x; i < problem.num_counters; i += KeyScoresConfig::kThreads)
      problem.counters[i] = 0;
  if (block < problem.num_kv_heads * problem.num_key_parts)
    key_scores::run<kWidth, Reader, kRowBits, kPlanes>(arguments, shared_memory);
  if (first_slice && blockIdx.y == 0) run_exact_items(problem, block, shared_memory);
}

template <int kWidth, class Reader, int kRowBits, int kPlanes>
cudaError_t launch_key_scores(const key_scores::Arguments& arguments, dim3 grid, int shared_bytes,
                              cudaStream_t stream) {
  const auto kernel = key_scores_kernel<kWidth, Reader, kRowBits, kPlanes>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, KeyScoresConfig::kThreads, shared_bytes, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace commvq::cuda
