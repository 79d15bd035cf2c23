#pragma once

#include "common/polish_memory.hpp"
#include "common/sums.cuh"

namespace commvq::cuda {

/// What is moved at once, a place of the code with its value x and its row of E: a bit, or a number
/// of a graded code, whose row is that of its last bit.
template <bool kGraded>
struct PolishPlaces {
  static constexpr int kRowsOfWarp = 32;  ///< from the row of a place to that of the 32nd after it
  static constexpr int kBits = 1;         ///< of the code to a place, on average

  static __device__ int row(int place) { return place; }
  /// What x changes by, `left` being <E_i, v / s - u> and `square` |E_i|^2.
  static __device__ float change(int, float x, float left, float square) {
    const float flip = x > 0 ? -1.0f : 1.0f;
    return square - 2 * flip * left < 0 ? flip : 0.0f;
  }
  template <class Bit>
  static __device__ float read(int place, Bit bit) {
    return bit(place);
  }
  template <class Store>
  static __device__ void write(int place, float x, Store store) {
    store(place, x);
  }
};
template <>
struct PolishPlaces<true> {
  static constexpr int kRowsOfWarp = 64;
  static constexpr int kBits = 2;

  static __device__ int num_bits(int place) {
    return place % 4 == 0 ? 3 : (place % 4 == 3 ? 1 : 2);
  }
  static __device__ int row(int place) {
    return place / 4 * 8 + 2 * (place % 4) + (place % 4 == 3 ? 1 : 2);
  }
  static __device__ float change(int place, float x, float left, float square) {
    const float best = rintf(x + left / square);
    const auto largest = static_cast<float>((1 << num_bits(place)) - 1);
    return fabsf(best) < INFINITY ? fminf(fmaxf(best, 0.0f), largest) - x : 0.0f;
  }
  template <class Bit>
  static __device__ float read(int place, Bit bit) {
    float x = 0;
    for (int k = 0; k < num_bits(place); ++k) x += bit(row(place) - k) * static_cast<float>(1 << k);
    return x;
  }
  template <class Store>
  static __device__ void write(int place, float x, Store store) {
    for (int k = 0; k < num_bits(place); ++k)
      store(row(place) - k, static_cast<float>(static_cast<int>(x) >> k & 1));
  }
};

/// Shared memory of a warp that polishes the code of one value, `num_places` floats each. Lane i
/// has places i, i + 32 and so on; no other lane touches them.
struct PolishShared {
  float* of_value;  ///< <E_i, v>, for v of unit norm
  float* squares;   ///< |E_i|^2
  float* code;      ///< x
  float* of_sum;    ///< <E_i, u>, u = E^T b, where registers do not hold them

  __device__ PolishShared(unsigned char* memory, int num_places)
      : of_value(reinterpret_cast<float*>(memory)),
        squares(of_value + num_places),
        code(squares + num_places),
        of_sum(code + num_places) {}
};

/// A lane's <E_i, u>, for place 32 i + lane: in registers of kPlaces places, a multiple of 32; with
/// 0 in shared memory, of any number of places.
template <int kPlaces>
struct PolishSums {
  static constexpr int kUnrolled = kPlaces / 32;
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

/// Places of a lane, and whether it has an i-th one.
template <int kPlaces>
__device__ __forceinline__ int polish_count(int num_places) {
  return kPlaces > 0 ? kPlaces / 32 : (num_places + 31) / 32;
}
template <int kPlaces>
__device__ __forceinline__ bool polish_has(int num_places, int i) {
  return kPlaces > 0 || 32 * i + static_cast<int>(threadIdx.x) % 32 < num_places;
}

/// What v is divided by before u is compared with it: 1 / s for the best scale s = <v, u> / |u|^2;
/// |u| where that is not positive, 1 where u is zero.
template <int kPlaces>
__device__ __forceinline__ float polish_factor(int num_places, const PolishShared& at,
                                               PolishSums<kPlaces>& sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  double square = 0, product = 0;  // |u|^2 and <v, u>
#pragma unroll PolishSums < kPlaces> ::kUnrolled
  for (int i = 0; i < polish_count<kPlaces>(num_places); ++i) {
    if (!polish_has<kPlaces>(num_places, i)) break;
    const int own = 32 * i + lane;
    square += static_cast<double>(sums[i]) * at.code[own];
    product += static_cast<double>(at.of_value[own]) * at.code[own];
  }
  square = warp_sum(square);
  product = warp_sum(product);
  const double length = sqrt(square > 0 ? square : 0.0);
  double scale = 1;
  if (length > 0) scale = product > 0 ? product / (length * length) : 1 / length;
  return static_cast<float>(1 / scale);
}

/// Moves single places where that lowers the error, in order and up to `sweeps` times over, as the
/// host's value_polish::polish does. All lanes of a warp call. A lane decides for its place as if
/// it were its turn; the first lane that would move has seen all moves before it. `gram` is E E^T,
/// [num_bits][num_bits].
template <int kPlaces, bool kGraded>
__device__ __forceinline__ void polish_places(const float* gram, int num_bits, int sweeps,
                                              const PolishShared& at, PolishSums<kPlaces>& sums) {
  using Places = PolishPlaces<kGraded>;
  const int lane = static_cast<int>(threadIdx.x) % 32, num_places = num_bits / Places::kBits;
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    const float inverse = polish_factor(num_places, at, sums);
    bool moved = false;
#pragma unroll PolishSums < kPlaces> ::kUnrolled
    for (int i = 0; i < polish_count<kPlaces>(num_places); ++i) {
      const int own = 32 * i + lane;
      const bool there = polish_has<kPlaces>(num_places, i);
      const float wanted = there ? at.of_value[own] * inverse : 0.0f;
      const float square = there ? at.squares[own] : 0.0f;
      float x = there ? at.code[own] : 0.0f;
      unsigned undecided = ~0u;  // lanes
      for (;;) {
        const float change = there ? Places::change(own, x, wanted - sums[i], square) : 0.0f;
        const unsigned lanes = __ballot_sync(0xffffffffu, change != 0) & undecided;
        if (lanes == 0) break;
        const int next = __ffs(static_cast<int>(lanes)) - 1;
        const float of_next = __shfl_sync(0xffffffffu, change, next);
        const float* const row =
            gram + Index{Places::row(32 * i + next)} * num_bits + Places::row(lane);
#pragma unroll 8
        for (int j = 0; j < polish_count<kPlaces>(num_places); ++j) {
          if (!polish_has<kPlaces>(num_places, j)) break;
          sums[j] += of_next * row[Places::kRowsOfWarp * j];
        }
        if (lane == next) x += change;
        undecided = next == 31 ? 0 : ~0u << (next + 1);
        moved = true;
      }
      if (there) at.code[own] = x;
    }
    if (!moved) break;
  }
}

/// Polishes the code of one value: `num_bits` is kBits, unless that is 0. `bit(i)` reads a bit of
/// the code as 0 or 1, `store(i, bit)` writes it.
template <int kBits, bool kGraded, class Bit, class Store>
__device__ __forceinline__ void polish_code(const float* gram, int num_bits, int sweeps,
                                            const float* value_products, const float* sum_products,
                                            unsigned char* memory, Bit bit, Store store) {
  using Places = PolishPlaces<kGraded>;
  constexpr int kPlaces = kBits / Places::kBits;
  const int lane = static_cast<int>(threadIdx.x) % 32, num_places = num_bits / Places::kBits;
  const PolishShared at(memory, num_places);
  PolishSums<kPlaces> sums(at);
#pragma unroll PolishSums < kPlaces> ::kUnrolled
  for (int i = 0; i < polish_count<kPlaces>(num_places); ++i) {
    if (!polish_has<kPlaces>(num_places, i)) break;
    const int own = 32 * i + lane, row = Places::row(own);
    at.of_value[own] = value_products[row];
    at.squares[own] = gram[Index{row} * num_bits + row];
    at.code[own] = Places::read(own, bit);
    sums[i] = sum_products[row];
  }
  polish_places<kPlaces, kGraded>(gram, num_bits, sweeps, at, sums);
  for (int i = lane; i < num_places; i += 32) Places::write(i, at.code[i], store);
}

}  // namespace commvq::cuda
