#pragma once

#include "common/launch.cuh"
#include "decode_attention/exact_tokens.cuh"
#include "decode_attention/kernels.cuh"
#include "decode_attention/key_scores/kernel.cuh"

namespace commvq::cuda {

/// Attention over the exact tokens, of heads of any size that rows of so many pairs are for.
template <int kWidth>
__device__ __forceinline__ void attend_exactly(const Problem& problem, int block) {
  constexpr int kThreads = KeyScoresConfig::kThreads;
  if (problem.head_dim == 128) {
    exact_tokens::run_items<kThreads, 2>(problem, block);
  } else if (kWidth == 64 || problem.head_dim == 256) {
    exact_tokens::run_items<kThreads, 4>(problem, block);
  } else {
    exact_tokens::run_items<kThreads, 1>(problem, block);
  }
}

/// Thread blocks (part and head, block of rows) score coded keys; in the first slice they and
/// num_exact_blocks others also attend over the exact tokens.
template <int kWidth, class Reader, int kTiles>
__global__ void __launch_bounds__(KeyScoresConfig::kThreads, 1)
    key_scores_kernel(const __grid_constant__ key_scores::Arguments arguments) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (Reader::kRowBits == 4)
    return;  // too little shared memory: see DevicePageLayout::key_row_bits
#endif
  extern __shared__ __align__(128) std::uint8_t shared_memory[];
  const Problem& problem = arguments.problem;
  const int block = static_cast<int>(blockIdx.x);
  const bool first_slice =
      arguments.turn == key_scores::Turn::kOnly || arguments.turn == key_scores::Turn::kFirst;
  if (block < problem.num_kv_heads * problem.num_key_parts) {
    key_scores::run<kWidth, Reader, kTiles>(arguments, shared_memory);
  } else {
    start_after_previous_kernel();
  }
  if (first_slice) clear_counters<KeyScoresConfig::kThreads>(problem);
  if (first_slice && blockIdx.y == 0) attend_exactly<kWidth>(problem, block);
}

template <int kWidth, class Reader, int kTiles>
cudaError_t launch_key_scores(const key_scores::Arguments& arguments, dim3 grid, int shared_bytes,
                              cudaStream_t stream) {
  const auto kernel = key_scores_kernel<kWidth, Reader, kTiles>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  return launch_early(kernel, grid, KeyScoresConfig::kThreads, shared_bytes, stream, arguments);
}

}  // namespace commvq::cuda
