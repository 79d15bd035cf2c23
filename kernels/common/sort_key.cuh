#pragma once

#include <cstdint>

namespace commvq::cuda {

/// Position of an extension in the order of the search: error, then candidate, a and b.
using SortKey = unsigned long long;
constexpr SortKey kLastKey = ~0ull;

/// Maps floats to integers of the same order.
__device__ __forceinline__ std::uint32_t ordered_bits(float value) {
  const std::uint32_t bits = __float_as_uint(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered_bits(std::uint32_t ordered) {
  return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}
__device__ __forceinline__ SortKey sort_key(float error, int candidate, int a, int b) {
  return static_cast<SortKey>(ordered_bits(error + 0.0f)) << 32 |  // + 0: one zero only
         (static_cast<std::uint32_t>(candidate) << 28 | static_cast<std::uint32_t>(a) << 14 |
          static_cast<std::uint32_t>(b));
}
/// The least key of a warp.
__device__ __forceinline__ SortKey warp_least(SortKey key) {
  const auto high = static_cast<std::uint32_t>(key >> 32);
  const std::uint32_t least = __reduce_min_sync(0xffffffffu, high);
  const std::uint32_t low =
      __reduce_min_sync(0xffffffffu, high == least ? static_cast<std::uint32_t>(key) : ~0u);
  return static_cast<SortKey>(least) << 32 | low;
}
__device__ __forceinline__ float error_of(SortKey key) {
  return from_ordered_bits(static_cast<std::uint32_t>(key >> 32));
}
__device__ __forceinline__ int candidate_of(std::uint32_t choice) {
  return choice >> 28;
}
__device__ __forceinline__ int a_of(std::uint32_t choice) {
  return choice >> 14 & 0x3fff;
}
__device__ __forceinline__ int b_of(std::uint32_t choice) {
  return choice & 0x3fff;
}

}  // namespace commvq::cuda
