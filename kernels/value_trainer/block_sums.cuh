#pragma once

namespace commvq::cuda::value_trainer {

/// Threads of a block that sums.
constexpr int kThreads = 256;

/// The block's sum, for every thread, in a fixed order. All threads call.
template <class T>
__device__ T block_sum(T x) {
  __shared__ T sums[kThreads / 32];
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  __syncthreads();  // the sums of the call before have been read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  T total = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += sums[warp];
  return total;
}

}  // namespace commvq::cuda::value_trainer
