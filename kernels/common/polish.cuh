#pragma once

#include "common/polish_memory.hpp"
#include "common/sums.cuh"

namespace commvq::cuda {

/// Shared memory of a warp that polishes the code of one value, `num_bits` numbers each. Lane i has
/// numbers i, i + 32 and so on; no other lane touches them.
struct PolishShared {
  float* of_value;  ///< <E_i, v>, for v of unit norm
  float* of_sum;    ///< <E_i, u>, u = E^T b
  float* squares;   ///< |E_i|^2
  float* bits;      ///< 0 or 1

  __device__ PolishShared(unsigned char* memory, int num_bits)
      : of_value(reinterpret_cast<float*>(memory)),
        of_sum(of_value + num_bits),
        squares(of_sum + num_bits),
        bits(squares + num_bits) {}
};

/// What v is divided by before u is compared with it: 1 / s for the best scale s = <v, u> / |u|^2;
/// |u| where that is not positive, 1 where u is zero.
__device__ __forceinline__ float polish_factor(int num_bits, const PolishShared& at) {
  double square = 0, product = 0;  // |u|^2 and <v, u>
  for (int i = static_cast<int>(threadIdx.x) % 32; i < num_bits; i += 32) {
    square += static_cast<double>(at.of_sum[i]) * at.bits[i];
    product += static_cast<double>(at.of_value[i]) * at.bits[i];
  }
  square = warp_sum(square);
  product = warp_sum(product);
  const double length = sqrt(square > 0 ? square : 0.0);
  double scale = 1;
  if (length > 0) scale = product > 0 ? product / (length * length) : 1 / length;
  return static_cast<float>(1 / scale);
}

/// Flips single bits where that lowers the error, in order and up to `sweeps` times over, as the
/// host's value_polish::polish does. All lanes of a warp call. A lane decides for its bit as if it
/// were its turn; the first lane that would flip has seen all flips before it. `gram` is E E^T,
/// [num_bits][num_bits].
__device__ __forceinline__ void polish_bits(const float* gram, int num_bits, int sweeps,
                                            const PolishShared& at) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    const float inverse = polish_factor(num_bits, at);
    bool flipped = false;
    for (int first = 0; first < num_bits; first += 32) {
      const int own = first + lane;
      const bool there = own < num_bits;
      const float wanted = there ? at.of_value[own] * inverse : 0.0f;
      const float square = there ? at.squares[own] : 0.0f;
      float bit = there ? at.bits[own] : 0.0f;
      unsigned undecided = ~0u;  // lanes
      for (;;) {
        const float change = bit > 0 ? -1.0f : 1.0f;
        const bool flips = there && square - 2 * change * (wanted - at.of_sum[own]) < 0;
        const unsigned lanes = __ballot_sync(0xffffffffu, flips) & undecided;
        if (lanes == 0) break;
        const int next = __ffs(static_cast<int>(lanes)) - 1;
        const float of_next = __shfl_sync(0xffffffffu, change, next);
        const float* const row = gram + Index{first + next} * num_bits;
#pragma unroll 8
        for (int i = lane; i < num_bits; i += 32) at.of_sum[i] += of_next * row[i];
        if (lane == next) bit += change;
        undecided = next == 31 ? 0 : ~0u << (next + 1);
        flipped = true;
      }
      if (there) at.bits[own] = bit;
    }
    if (!flipped) break;
  }
}

}  // namespace commvq::cuda
