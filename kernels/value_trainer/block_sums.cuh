#pragma once

#include "common/sums.cuh"

namespace commvq::cuda::value_trainer {

/// Threads of a block that sums.
constexpr int kThreads = 256;

/// The block's sum, for every thread. All threads call.
template <class T>
__device__ T block_sum(T x) {
  __shared__ T sums[kThreads / 32];
  return cuda::block_sum<kThreads>(x, sums);
}

}  // namespace commvq::cuda::value_trainer
