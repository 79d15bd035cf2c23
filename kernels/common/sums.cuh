#pragma once

namespace commvq::cuda {

/// Sum over a warp, for every lane, in a fixed order. All lanes call.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

/// Sum over the block, likewise. All threads call; `sums` is shared, one number a warp.
template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T value, T* sums) {
  value = warp_sum(value);
  __syncthreads();  // the sums of the call before have been read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  T total = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += sums[warp];
  return total;
}

}  // namespace commvq::cuda
