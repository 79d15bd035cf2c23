#pragma once

#include "common/polish_memory.hpp"
#include "common/sums.cuh"

namespace commvq::cuda {

/// Shared memory of a warp that polishes the code of one value, `num_bits` numbers each. Lane i has
/// numbers i, i + 32 and so on; no other lane touches them.
struct PolishShared {
  float* of_value;  ///< <E_i, v>, for v of unit norm
  float* squares;   ///< |E_i|^2
  float* bits;      ///< 0 or 1
  float* of_sum;    ///< <E_i, u>, u = E^T b, where registers do not hold them

  __device__ PolishShared(unsigned char* memory, int num_bits)
      : of_value(reinterpret_cast<float*>(memory)),
        squares(of_value + num_bits),
        bits(squares + num_bits),
        of_sum(bits + num_bits) {}
};

/// A lane's <E_i, u>, for bit 32 i + lane: in registers of kBits bits, a multiple of 32; with 0 in
/// shared memory, of any number of bits.
template <int kBits>
struct PolishSums {
  static constexpr int kUnrolled = kBits / 32;
  float sums[kUnrolled];

  __device__ explicit PolishSums(const PolishShared&) {}
  __device__ float& operator[](int i) { return sums[i]; }
};
template <>
struct PolishSums<0> {
  static constexpr int kUnrolled = 1;
  float* sums;

  __device__ explicit PolishSums(const PolishShared& at) : sums(at.of_sum + threadIdx.x % 32) {}
  __device__ float& operator[](int i) { return sums[32 * i]; }
};

/// Bits of a lane, and whether it has an i-th one.
template <int kBits>
__device__ __forceinline__ int polish_count(int num_bits) {
  return kBits > 0 ? kBits / 32 : (num_bits + 31) / 32;
}
template <int kBits>
__device__ __forceinline__ bool polish_has(int num_bits, int i) {
  return kBits > 0 || 32 * i + static_cast<int>(threadIdx.x) % 32 < num_bits;
}

/// What v is divided by before u is compared with it: 1 / s for the best scale s = <v, u> / |u|^2;
/// |u| where that is not positive, 1 where u is zero.
template <int kBits>
__device__ __forceinline__ float polish_factor(int num_bits, const PolishShared& at,
                                               PolishSums<kBits>& sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  double square = 0, product = 0;  // |u|^2 and <v, u>
#pragma unroll PolishSums < kBits> ::kUnrolled
  for (int i = 0; i < polish_count<kBits>(num_bits); ++i) {
    if (!polish_has<kBits>(num_bits, i)) break;
    const int own = 32 * i + lane;
    square += static_cast<double>(sums[i]) * at.bits[own];
    product += static_cast<double>(at.of_value[own]) * at.bits[own];
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
template <int kBits>
__device__ __forceinline__ void polish_bits(const float* gram, int num_bits, int sweeps,
                                            const PolishShared& at, PolishSums<kBits>& sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    const float inverse = polish_factor(num_bits, at, sums);
    bool flipped = false;
#pragma unroll PolishSums < kBits> ::kUnrolled
    for (int i = 0; i < polish_count<kBits>(num_bits); ++i) {
      const int own = 32 * i + lane;
      const bool there = polish_has<kBits>(num_bits, i);
      const float wanted = there ? at.of_value[own] * inverse : 0.0f;
      const float square = there ? at.squares[own] : 0.0f;
      float bit = there ? at.bits[own] : 0.0f;
      unsigned undecided = ~0u;  // lanes
      for (;;) {
        const float change = bit > 0 ? -1.0f : 1.0f;
        const bool flips = there && square - 2 * change * (wanted - sums[i]) < 0;
        const unsigned lanes = __ballot_sync(0xffffffffu, flips) & undecided;
        if (lanes == 0) break;
        const int next = __ffs(static_cast<int>(lanes)) - 1;
        const float of_next = __shfl_sync(0xffffffffu, change, next);
        const float* const row = gram + Index{32 * i + next} * num_bits + lane;
#pragma unroll 8
        for (int j = 0; j < polish_count<kBits>(num_bits); ++j) {
          if (!polish_has<kBits>(num_bits, j)) break;
          sums[j] += of_next * row[32 * j];
        }
        if (lane == next) bit += change;
        undecided = next == 31 ? 0 : ~0u << (next + 1);
        flipped = true;
      }
      if (there) at.bits[own] = bit;
    }
    if (!flipped) break;
  }
}

/// Polishes the code of one value: `num_bits` is kBits, unless that is 0. `bit(i)` reads a bit of
/// the code as 0 or 1, `store(i, bit)` writes it.
template <int kBits, class Bit, class Store>
__device__ __forceinline__ void polish_code(const float* gram, int num_bits, int sweeps,
                                            const float* value_products, const float* sum_products,
                                            unsigned char* memory, Bit bit, Store store) {
  const PolishShared at(memory, num_bits);
  PolishSums<kBits> sums(at);
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll PolishSums < kBits> ::kUnrolled
  for (int i = 0; i < polish_count<kBits>(num_bits); ++i) {
    if (!polish_has<kBits>(num_bits, i)) break;
    const int own = 32 * i + lane;
    at.of_value[own] = value_products[own];
    at.squares[own] = gram[Index{own} * num_bits + own];
    at.bits[own] = bit(own);
    sums[i] = sum_products[own];
  }
  polish_bits(gram, num_bits, sweeps, at, sums);
  for (int i = lane; i < num_bits; i += 32) store(i, at.bits[i]);
}

}  // namespace commvq::cuda
