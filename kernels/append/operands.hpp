#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "commvq/core/float16.hpp"

namespace commvq::cuda {

/// The power of two that takes numbers up to `largest` to at most 2^14: fp16 holds them, and what
/// it leaves of them as well.
inline double scale_for(double largest) {
  if (!(largest > 0)) return 1;
  const int exponent = std::ilogb(largest) + 1;
  return std::ldexp(1.0, std::clamp(14 - exponent, -100, 100));
}

template <class T>
double largest_of(const std::vector<T>& values) {
  double largest = 0;
  for (const T value : values) largest = std::max(largest, std::abs(double{value}));
  return largest;
}

/// A scaled number as the sum of two in fp16, 22 bits together.
struct Halves {
  std::uint16_t hi, lo;
  explicit Halves(double scaled)
      : hi(to_fp16(static_cast<float>(scaled))),
        lo(to_fp16(static_cast<float>(scaled - double{from_fp16(hi)}))) {}
};

/// Appends one lane's operands of `multiply_add`'s b, a [16][8] piece of scaled numbers, as
/// hi b0, hi b1, lo b0, lo b1. `number(k, n)` gives row k of column n.
template <class Number>
void add_lane_operands(std::vector<std::uint32_t>& operands, int lane, Number number) {
  std::uint32_t words[4] = {};
  for (int i = 0; i < 4; ++i) {
    const Halves halves(number(i / 2 * 8 + lane % 4 * 2 + i % 2, lane / 4));
    words[i / 2] |= static_cast<std::uint32_t>(halves.hi) << (16 * (i % 2));
    words[2 + i / 2] |= static_cast<std::uint32_t>(halves.lo) << (16 * (i % 2));
  }
  operands.insert(operands.end(), words, words + 4);
}

}  // namespace commvq::cuda
