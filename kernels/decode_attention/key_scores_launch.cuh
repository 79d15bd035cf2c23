#pragma once

#include "common/launch.cuh"
#include "decode_attention/exact_tokens.cuh"
#include "decode_attention/kernels.cuh"

namespace commvq::cuda {

/// Thread blocks (head, part, block of rows) score coded keys; those with part >= num_key_parts
/// attend over the exact tokens of a query token.
template <int kWidth, class Reader>
__global__ void __launch_bounds__(KeyScoresConfig::kThreads, 1)
    key_scores_kernel(const __grid_constant__ key_scores::Arguments arguments) {
  extern __shared__ __align__(128) std::uint8_t shared_memory[];
  const Problem& problem = arguments.problem;
  let_next_kernel_start();
  const int part = static_cast<int>(blockIdx.y);
  const bool first_slice =
      arguments.turn == key_scores::Turn::kOnly || arguments.turn == key_scores::Turn::kFirst;
  if (first_slice && blockIdx.x == 0 && part == 0 && blockIdx.z == 0)
    for (int i = threadIdx.x; i < problem.num_counters; i += KeyScoresConfig::kThreads)
      problem.counters[i] = 0;
  if (part < problem.num_key_parts) {
    key_scores::run<kWidth, Reader>(arguments, shared_memory);
  } else if (blockIdx.z == 0) {
    exact_tokens::run(problem, part - problem.num_key_parts, blockIdx.x, shared_memory);
  }
}

template <int kWidth, class Reader>
cudaError_t launch_key_scores(const key_scores::Arguments& arguments, dim3 grid, int shared_bytes,
                              cudaStream_t stream) {
  const auto kernel = key_scores_kernel<kWidth, Reader>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, KeyScoresConfig::kThreads, shared_bytes, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace commvq::cuda
