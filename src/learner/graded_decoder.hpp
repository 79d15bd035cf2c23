#pragma once

#include <vector>

#include "commvq/value_codec/value_codec.hpp"

#include "learner/graded_tie.hpp"
#include "value_codec/value_layers.hpp"

/// Decoders of graded value codes (see `ValueCodecConfig::graded`): a bit's row is its weight times
/// the row of its number.
namespace commvq::graded_decoder {

/// Ties a decoder, `[num_bits][num_channels]`.
inline void tie(float* decoder, Index num_bits, Index num_channels) {
  for (Index first = 0; first < num_bits; first += 8)
    for (Index c = 0; c < num_channels; ++c)
      tie_channel(decoder + first * num_channels + c, num_channels);
}

using Rows = value_layers::Matrix<float>;

/// The decoder `[bits][num_channels]` whose numbers have these rows.
Rows of_numbers(const Rows& numbers);

/// A decoder to begin with, `[num_code_bits][C]`, from mean and covariance of the values `rows`,
/// scaled to unit norm: see graded_directions. Decoded values are long beside a step of Adam, so
/// that the encoder learns these directions before they change much.
std::vector<float> initial(MatrixView<const float> values, const std::vector<Index>& rows,
                           const ValueCodecConfig& config);

}  // namespace commvq::graded_decoder
