#pragma once

#include "common/polish_memory.hpp"
#include "common/sums.cuh"

namespace commvq::cuda {

/// Shared memory of a block that polishes the code of one value, `num_bits` numbers each.
struct PolishShared {
  float* of_value;  ///< <E_i, v>, for v of unit norm
  float* of_sum;    ///< <E_i, u>, u = E^T b
  float* bits;      ///< 0 or 1
  double* sums;     ///< one a warp

  __device__ PolishShared(unsigned char* memory, int num_bits)
      : of_value(reinterpret_cast<float*>(memory + kPolishSumBytes)),
        of_sum(of_value + num_bits),
        bits(of_sum + num_bits),
        sums(reinterpret_cast<double*>(memory)) {}
};

/// Flips single bits where that lowers the error, up to `sweeps` times over, as the host's
/// value_polish::polish does. The block's threads see the same numbers and decide alike, so that
/// they wait for each other at flips only. `gram` is E E^T, [num_bits][num_bits].
template <int kThreads>
__device__ __forceinline__ void polish_bits(const float* gram, int num_bits, int sweeps,
                                            const PolishShared& at) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    __syncthreads();
    double square = 0, product = 0;  // |u|^2 and <v, u>
    for (int i = thread; i < num_bits; i += kThreads) {
      square += static_cast<double>(at.of_sum[i]) * at.bits[i];
      product += static_cast<double>(at.of_value[i]) * at.bits[i];
    }
    square = block_sum<kThreads>(square, at.sums);
    product = block_sum<kThreads>(product, at.sums);
    // The best scale s = <v, u> / |u|^2; 1 / |u| where that is not positive, 1 where u is zero.
    const double length = sqrt(square > 0 ? square : 0.0);
    double scale = 1;
    if (length > 0) scale = product > 0 ? product / (length * length) : 1 / length;
    const auto inverse = static_cast<float>(1 / scale);
    bool flipped = false;
    for (int i = 0; i < num_bits; ++i) {
      const float change = at.bits[i] > 0 ? -1.0f : 1.0f;
      const float left = at.of_value[i] * inverse - at.of_sum[i];
      const float* const row = gram + Index{i} * num_bits;
      if (!(row[i] - 2 * change * left < 0)) continue;
      __syncthreads();  // all have decided
      for (int j = thread; j < num_bits; j += kThreads) {
        at.of_sum[j] += change * row[j];
        if (j == i) at.bits[i] += change;
      }
      __syncthreads();
      flipped = true;
    }
    if (!flipped) break;
  }
  __syncthreads();
}

}  // namespace commvq::cuda
