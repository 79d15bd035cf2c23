#pragma once

#include <vector>

#include "commvq/core/graded_bits.hpp"
#include "commvq/core/host_device.hpp"
#include "commvq/value_codec/value_codec.hpp"

/// Decoders of graded value codes (see `ValueCodecConfig::graded`): a bit's row is its weight times
/// the row of its number.
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

/// Ties a decoder, `[num_bits][num_channels]`.
inline void tie(float* decoder, Index num_bits, Index num_channels) {
  for (Index first = 0; first < num_bits; first += 8)
    for (Index c = 0; c < num_channels; ++c)
      tie_channel(decoder + first * num_channels + c, num_channels);
}

/// A decoder to begin with, `[num_code_bits][C]`, from mean and covariance of the values `rows`,
/// scaled to unit norm: see graded_directions. Decoded values are long beside a step of Adam, so
/// that the encoder learns these directions before they change much.
std::vector<float> initial(MatrixView<const float> values, const std::vector<Index>& rows,
                           const ValueCodecConfig& config);

}  // namespace commvq::graded_decoder
