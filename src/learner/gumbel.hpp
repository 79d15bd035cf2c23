#pragma once

#include <cstdint>

/// Random numbers of the value trainer: functions of a key and a counter, so that the number for a
/// place is the same whoever computes it.
namespace commvq::gumbel {

#if defined(__CUDACC__)
__host__ __device__
#endif
/// Uniform in (0, 1). -log(-log(uniform)) is Gumbel noise.
inline float uniform_at(std::uint32_t key, std::uint32_t counter) {
  std::uint32_t x = counter * 0x9e3779b9u + key;
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  x ^= x >> 16;
  return (static_cast<float>(x >> 9) + 0.5f) * 0x1p-23f;
}

}  // namespace commvq::gumbel
