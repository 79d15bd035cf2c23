#include "engine/peers/kivi.hpp"

#include <algorithm>
#include <cmath>

#include "commvq/core/float16.hpp"

namespace engine {

KiviCodec::KiviCodec(int bits, Groups groups, Index num_channels)
    : bits_(bits), groups_(groups), num_channels_(num_channels) {
  commvq::require(bits >= 1 && bits <= 8, "a uniform code has ", bits,
                  " bits; it must have 1 to 8");
  commvq::require(groups == Groups::kAlongTokens || num_channels % kGroupSize == 0, "values of ",
                  num_channels, " channels cannot be cut into groups of ", kGroupSize,
                  "; the number must be a multiple");
}

template <class Use>
void KiviCodec::for_each_group(Index num_rows, Use use) const {
  if (groups_ == Groups::kAlongTokens) {
    for (Index block = 0; block < num_rows / kGroupSize; ++block)
      for (Index channel = 0; channel < num_channels_; ++channel)
        use(block * kGroupSize * num_channels_ + channel, num_channels_);
  } else {
    for (Index first = 0; first < num_rows * num_channels_; first += kGroupSize) use(first, 1);
  }
}

PeerCodes KiviCodec::encode(MatrixView<const float> rows) const {
  const auto number = [&](Index i) { return rows(i / num_channels_, i % num_channels_); };
  const auto largest_code = static_cast<float>((1 << bits_) - 1);
  PeerCodes result;
  for_each_group(rows.rows, [&](Index first, Index stride) {
    float low = number(first), high = low;
    for (Index i = 1; i < kGroupSize; ++i) {
      low = std::min(low, number(first + i * stride));
      high = std::max(high, number(first + i * stride));
    }
    const std::uint16_t scale = commvq::to_fp16((high - low) / largest_code);
    const std::uint16_t zero = commvq::to_fp16(low);
    const float step = commvq::from_fp16(scale), origin = commvq::from_fp16(zero);
    for (Index i = 0; i < kGroupSize; ++i) {
      const float steps = step > 0 ? (number(first + i * stride) - origin) / step : 0.0f;
      result.codes.push_back(
          static_cast<std::uint16_t>(std::clamp(std::round(steps), 0.0f, largest_code)));
    }
    result.halves.insert(result.halves.end(), {scale, zero});
  });
  return result;
}

void KiviCodec::decode(const PeerCodes& codes, MatrixView<float> rows) const {
  auto code = codes.codes.begin();
  auto half = codes.halves.begin();
  for_each_group(rows.rows, [&](Index first, Index stride) {
    const float step = commvq::from_fp16(*half++), origin = commvq::from_fp16(*half++);
    for (Index i = first; i < first + kGroupSize * stride; i += stride)
      rows(i / num_channels_, i % num_channels_) = origin + step * static_cast<float>(*code++);
  });
}

}  // namespace engine
