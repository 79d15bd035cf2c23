#pragma once

#include <cstdint>

#include "commvq/core/view.hpp"

namespace commvq::cuda {

/// The angle of `distance` tokens, in radians within [-pi, pi]. `turns` is the angle of one token
/// in 2^-64 turns: whole turns fall away exactly, so the result is good to a float's rounding at
/// any distance.
__device__ __forceinline__ float angle_of(Index distance, std::uint64_t turns) {
  const std::uint64_t product = static_cast<std::uint64_t>(distance) * turns;
  return static_cast<float>(static_cast<std::int32_t>(product >> 32)) * 1.46291807926715968e-9f;
}

/// Cosine and sine of an angle within [-pi, pi], to about 5e-7.
__device__ __forceinline__ float2 rotation_of(Index distance, std::uint64_t turns) {
  float2 result;
  __sincosf(angle_of(distance, turns), &result.y, &result.x);
  return result;
}

}  // namespace commvq::cuda
