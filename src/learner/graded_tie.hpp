#pragma once

#include "commvq/core/graded_bits.hpp"
#include "commvq/core/host_device.hpp"
#include "commvq/core/view.hpp"

namespace commvq::graded_decoder {

/// Ties one channel of a byte's eight rows, `stride` apart. A number's row is the least-squares fit
/// to those of its bits k, sum of w_k row_k / sum of w_k^2; the bits' rows become w_k times that,
/// exactly.
COMMVQ_HOST_DEVICE inline void tie_channel(float* channel, Index stride) {
  constexpr GradedBit kBits[8] = {graded_bit(0), graded_bit(1), graded_bit(2), graded_bit(3),
                                  graded_bit(4), graded_bit(5), graded_bit(6), graded_bit(7)};
  float products[4] = {}, squares[4] = {};
  for (int i = 0; i < 8; ++i) {
    const auto weight = static_cast<float>(kBits[i].weight);
    products[kBits[i].number] += weight * channel[i * stride];
    squares[kBits[i].number] += weight * weight;
  }
  for (int i = 0; i < 8; ++i)
    channel[i * stride] = static_cast<float>(kBits[i].weight) *
                          (products[kBits[i].number] / squares[kBits[i].number]);
}

}  // namespace commvq::graded_decoder
