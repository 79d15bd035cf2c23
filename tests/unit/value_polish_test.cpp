#include <cmath>
#include <vector>

#include "commvq/core/float16.hpp"
#include "commvq/core/graded_bits.hpp"
#include "commvq/value_codec/value_codec.hpp"

#include <gtest/gtest.h>

#include "reference/random_cache.hpp"

namespace commvq {
namespace {

constexpr Index kTokens = 120;
constexpr int kChannels = 48;

/// Bits of a code, the rows they name added up in double precision, and the best scale.
struct Decoded {
  std::vector<int> bits;
  std::vector<double> sum = std::vector<double>(kChannels);
  double scale = 0;
  double stored_scale = 0;
  bool is_fitted = false;  ///< the sum points the value's way, so that a best scale exists

  Decoded(const ValueCodec& codec, const float* value, std::vector<int> bits_)
      : bits(std::move(bits_)) {
    double product = 0, square = 0, value_square = 0;
    for (int c = 0; c < kChannels; ++c) {
      double& total = sum[static_cast<std::size_t>(c)];
      for (std::size_t i = 0; i < bits.size(); ++i)
        total += static_cast<float>(bits[i]) * codec.decoder()(static_cast<Index>(i), c);
      product += value[c] * total;
      square += total * total;
      value_square += double(value[c]) * value[c];
    }
    is_fitted = product > 0;
    stored_scale = std::sqrt(value_square / square);
    scale = is_fitted ? product / square : stored_scale;
  }
  double error(const float* value) const {
    double result = 0;
    for (int c = 0; c < kChannels; ++c)
      result += std::pow(value[c] - scale * sum[static_cast<std::size_t>(c)], 2);
    return result;
  }
};

/// `current` with the bits from `first` on set to `pattern`.
Decoded with_bits(const ValueCodec& codec, const Decoded& current, std::size_t first,
                  std::size_t count, unsigned pattern) {
  Decoded changed = current;
  for (std::size_t i = first; i < first + count; ++i) {
    const int bit = static_cast<int>(pattern >> (i - first) & 1);
    for (int c = 0; c < kChannels; ++c)
      changed.sum[static_cast<std::size_t>(c)] +=
          static_cast<float>(bit - changed.bits[i]) * codec.decoder()(static_cast<Index>(i), c);
    changed.bits[i] = bit;
  }
  return changed;
}

/// One sweep straight from the definition: all patterns of a bit, or of the bits of a number, are
/// tried with the scale of the sweep's beginning, and the one of the least error kept. Returns
/// whether any bit changed.
bool reference_sweep(const ValueCodec& codec, const float* value, std::vector<int>& bits) {
  Decoded best(codec, value, bits);
  for (std::size_t first = 0, count; first < bits.size(); first += count) {
    count = codec.config().graded
                ? static_cast<std::size_t>(graded_bits(graded_bit(static_cast<int>(first)).number))
                : 1;
    const Decoded current = best;
    for (unsigned pattern = 0; pattern < 1u << count; ++pattern)
      if (Decoded changed = with_bits(codec, current, first, count, pattern);
          changed.error(value) < best.error(value))
        best = std::move(changed);
  }
  const bool changed = best.bits != bits;
  bits = best.bits;
  return changed;
}

struct Code {
  int bits;
  bool graded;
};

class ValuePolish : public testing::TestWithParam<Code> {
 protected:
  ValuePolish()
      : plain_(testing_support::random_value_codec(rng_, kChannels, GetParam().bits, 40, 1,
                                                   GetParam().graded)),
        values_(testing_support::normal_floats(rng_, kTokens * kChannels, 2.0)) {}

  ValueCodec polished(int sweeps) const {
    ValueCodecConfig config = plain_->config();
    config.polish_sweeps = sweeps;
    return {config, plain_->weights()};
  }
  const float* value(Index token) const {
    return &values_[static_cast<std::size_t>(token * kChannels)];
  }

  /// Codes of all values as bits; keeps the scales.
  std::vector<std::vector<int>> encode(const ValueCodec& codec) {
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(kTokens * codec.code_bytes()));
    scales_.resize(kTokens);
    codec.encode(as_matrix(std::as_const(values_), kTokens, kChannels),
                 as_matrix(codes, kTokens, codec.code_bytes()), scales_.data());
    std::vector<std::vector<int>> bits(kTokens);
    for (Index t = 0; t < kTokens; ++t)
      for (int i = 0; i < codec.config().num_code_bits(); ++i)
        bits[static_cast<std::size_t>(t)].push_back(
            codes[static_cast<std::size_t>(t * codec.code_bytes() + i / 8)] >> (i % 8) & 1);
    return bits;
  }

  testing_support::Rng rng_{31};
  std::shared_ptr<const ValueCodec> plain_;
  std::vector<float> values_;
  std::vector<std::uint16_t> scales_;
};

TEST_P(ValuePolish, ChangesTheReferencesBits) {
  auto expected = encode(*plain_);
  for (const int sweeps : {1, 2, 64}) {
    int different = 0;  // float and double may disagree where a change hardly matters
    const auto found = encode(polished(sweeps));
    for (Index t = 0; t < kTokens; ++t) {
      std::vector<int> bits = expected[static_cast<std::size_t>(t)];
      for (int sweep = 0; sweep < sweeps; ++sweep)
        if (!reference_sweep(*plain_, value(t), bits)) break;
      different += bits != found[static_cast<std::size_t>(t)];
    }
    EXPECT_LE(different, 2) << sweeps << " sweeps";
  }
}

TEST_P(ValuePolish, ErrorOfNoValueRisesAndTheNormIsRestored) {
  auto before = encode(*plain_);
  double first = 0, last = 0;
  for (const int sweeps : {1, 2, 4, 16}) {
    const auto after = encode(polished(sweeps));
    last = 0;
    for (Index t = 0; t < kTokens; ++t) {
      const auto at = static_cast<std::size_t>(t);
      const Decoded old(*plain_, value(t), before[at]), now(*plain_, value(t), after[at]);
      const double old_error = old.error(value(t));
      if (old.is_fitted) {
        EXPECT_LE(now.error(value(t)), old_error * (1 + 1e-6)) << "token " << t;
      }
      EXPECT_NEAR(from_bf16(scales_[at]), now.stored_scale, 0.005 * now.stored_scale);
      if (sweeps == 1) first += old_error;
      last += now.error(value(t));
    }
    before = after;
  }
  EXPECT_LT(last, 0.7 * first);
}

TEST_P(ValuePolish, ZeroValueDecodesToZeros) {
  std::fill_n(values_.begin(), kChannels, 0.0f);
  const auto bits = encode(polished(4));
  EXPECT_EQ(scales_[0], 0);
  EXPECT_EQ(bits[0], std::vector<int>(bits[0].size(), 0));
  EXPECT_NE(scales_[1], 0);
}

INSTANTIATE_TEST_SUITE_P(Codes, ValuePolish,
                         testing::Values(Code{1, false}, Code{2, false}, Code{1, true},
                                         Code{2, true}));

}  // namespace
}  // namespace commvq
