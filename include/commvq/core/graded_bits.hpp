#pragma once

#include "commvq/core/host_device.hpp"

namespace commvq {

/// Where one bit stands in a graded code (see `KeyCodecConfig::graded`,
/// `ValueCodecConfig::graded`): eight bits are numbers of 3, 2, 2 and 1 bits, the one that comes
/// first counting most.
struct GradedBit {
  int number;  ///< of the code's numbers, four for every eight bits
  int weight;  ///< what the bit adds to that number: 4, 2 or 1
};

/// Of bit `bit` of a code; of keys, of book 2 * stage + which of a group.
COMMVQ_HOST_DEVICE constexpr GradedBit graded_bit(int bit) {
  constexpr GradedBit kOfByte[8] = {{0, 4}, {0, 2}, {0, 1}, {1, 2}, {1, 1}, {2, 2}, {2, 1}, {3, 1}};
  return {bit / 8 * 4 + kOfByte[bit % 8].number, kOfByte[bit % 8].weight};
}

/// The last bit of the number that bit `bit` belongs to, of weight 1.
constexpr int graded_last_bit(int bit) {
  while (graded_bit(bit).weight > 1) ++bit;
  return bit;
}

/// Bits of number `number` of a code: 3, 2, 2 and 1 of a byte.
constexpr int graded_bits(int number) {
  int bits = 0;
  for (int bit = 0; bit < 8; ++bit) bits += graded_bit(bit).number == number % 4 ? 1 : 0;
  return bits;
}

}  // namespace commvq
