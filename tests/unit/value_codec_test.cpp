#include "commvq/value_codec/value_codec.hpp"

#include <cmath>
#include <limits>
#include <tuple>

#include "commvq/core/float16.hpp"

#include <gmock/gmock.h>

#include "reference/random_cache.hpp"

namespace commvq {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;
using testing_support::Rng;

/// Section 3.2 in double precision: the bits of a value, one per element.
std::vector<int> reference_bits(const ValueCodec& codec, const float* value) {
  const ValueCodecConfig& config = codec.config();
  const ValueCodecWeights& w = codec.weights();
  const auto C = static_cast<std::size_t>(config.num_channels);
  const auto H = static_cast<std::size_t>(config.hidden_size);
  double length = 0, mean = 0, variance = 0;
  for (std::size_t c = 0; c < C; ++c) length += double(value[c]) * value[c];
  length = std::sqrt(length);
  for (std::size_t c = 0; c < C; ++c) mean += value[c] / length / double(C);
  for (std::size_t c = 0; c < C; ++c) variance += std::pow(value[c] / length - mean, 2) / double(C);
  std::vector<double> hidden(H);
  for (std::size_t h = 0; h < H; ++h) {
    double sum = w.hidden_bias[h];
    for (std::size_t c = 0; c < C; ++c)
      sum += w.hidden_weight[h * C + c] *
             ((value[c] / length - mean) / std::sqrt(variance + 1e-5) * w.norm_gain[c] +
              w.norm_bias[c]);
    hidden[h] = sum * 0.5 * std::erfc(-sum / std::sqrt(2.0));
  }
  std::vector<int> bits;
  for (int group = 0; group < config.num_groups(); ++group) {
    double logits[4];
    for (std::size_t k = 0; k < 4; ++k) {
      const std::size_t row = static_cast<std::size_t>(group) * 4 + k;
      logits[k] = w.output_bias[row];
      for (std::size_t h = 0; h < H; ++h) logits[k] += w.output_weight[row * H + h] * hidden[h];
    }
    const auto best = std::max_element(logits, logits + 4) - logits;
    bits.push_back(best == 0 || best == 2);
    bits.push_back(best == 1 || best == 2);
  }
  return bits;
}

class ValueCodecTest : public testing::TestWithParam<int> {
 protected:
  ValueCodecTest()
      : codec_(testing_support::random_value_codec(rng_, kChannels, GetParam(), 40)),
        values_(testing_support::normal_floats(rng_, kTokens * kChannels, 2.0)),
        codes_(static_cast<std::size_t>(kTokens * codec_->code_bytes())),
        scales_(kTokens),
        decoded_(values_.size()) {}

  void encode() {
    codec_->encode(as_matrix(std::as_const(values_), kTokens, kChannels),
                   as_matrix(codes_, kTokens, codec_->code_bytes()), scales_.data());
  }
  void decode() {
    codec_->decode(as_matrix(std::as_const(codes_), kTokens, codec_->code_bytes()), scales_.data(),
                   as_matrix(decoded_, kTokens, kChannels));
  }
  std::vector<int> bits_of(Index token) const {
    std::vector<int> bits;
    for (int i = 0; i < codec_->config().num_code_bits(); ++i)
      bits.push_back(
          codes_[static_cast<std::size_t>(token * codec_->code_bytes() + i / 8)] >> (i % 8) & 1);
    return bits;
  }
  double length_of(const std::vector<float>& values, Index token) const {
    double sum = 0;
    for (Index c = 0; c < kChannels; ++c)
      sum += std::pow(values[static_cast<std::size_t>(token * kChannels + c)], 2);
    return std::sqrt(sum);
  }

  static constexpr Index kTokens = 130;
  static constexpr int kChannels = 48;
  Rng rng_{11};
  std::shared_ptr<const ValueCodec> codec_;
  std::vector<float> values_;
  std::vector<std::uint8_t> codes_;
  std::vector<std::uint16_t> scales_;
  std::vector<float> decoded_;
};

TEST_P(ValueCodecTest, CodesEqualTheReferences) {
  encode();
  int different = 0;  // float and double may disagree where two logits are almost equal
  for (Index t = 0; t < kTokens; ++t)
    different +=
        bits_of(t) != reference_bits(*codec_, &values_[static_cast<std::size_t>(t) * kChannels]);
  EXPECT_LE(different, 1);
}

TEST_P(ValueCodecTest, DecodedValueIsTheSumOfRowsWithTheNormRestored) {
  encode();
  decode();
  for (Index t = 0; t < kTokens; ++t) {
    const std::vector<int> bits = bits_of(t);
    std::vector<double> sum(kChannels);
    double length = 0;
    for (int c = 0; c < kChannels; ++c) {
      for (std::size_t i = 0; i < bits.size(); ++i)
        sum[static_cast<std::size_t>(c)] +=
            static_cast<float>(bits[i]) * codec_->decoder()(static_cast<Index>(i), c);
      length += std::pow(sum[static_cast<std::size_t>(c)], 2);
    }
    const double norm = length_of(values_, t);
    for (int c = 0; c < kChannels; ++c)
      EXPECT_NEAR(decoded_[static_cast<std::size_t>(t * kChannels + c)],
                  sum[static_cast<std::size_t>(c)] * norm / std::sqrt(length), 0.005 * norm);
    EXPECT_NEAR(length_of(decoded_, t), norm, 0.004 * norm);
  }
}

TEST_P(ValueCodecTest, CodeDoesNotDependOnTheValuesLength) {
  encode();
  const auto codes = codes_;
  for (const float factor : {0x1p60f, 0x1p-120f}) {
    for (float& value : values_) value *= factor;
    encode();
    EXPECT_EQ(codes, codes_) << factor;
  }
}

TEST_P(ValueCodecTest, ZeroValueDecodesToZeros) {
  std::fill_n(values_.begin() + 7 * kChannels, kChannels, 0.0f);
  encode();
  decode();
  EXPECT_EQ(scales_[7], 0);
  EXPECT_EQ(length_of(decoded_, 7), 0);
}

TEST_P(ValueCodecTest, NamesTokenAndChannelOfWhatIsNotFinite) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    values_[static_cast<std::size_t>(129 * kChannels + 31)] = bad;
    EXPECT_THAT([&] { encode(); }, ThrowsMessage<Error>(AllOf(HasSubstr("129"), HasSubstr("31"))));
  }
}

TEST_P(ValueCodecTest, ShapesAreChecked) {
  EXPECT_THAT(
      [&] {
        codec_->encode({values_.data(), kTokens, 40},
                       as_matrix(codes_, kTokens, codec_->code_bytes()), scales_.data());
      },
      ThrowsMessage<Error>(HasSubstr("40")));
}

TEST_P(ValueCodecTest, ChannelScalesCodeDividedValues) {
  // Powers of two, so that division is exact and codes and scales must be equal.
  std::vector<float> scales(kChannels);
  for (float& scale : scales) scale = std::ldexp(1.0f, static_cast<int>(rng_() % 7) - 3);
  ValueCodecWeights weights = codec_->weights();
  weights.channel_scales = scales;
  for (std::size_t i = 0; i < weights.decoder.size(); ++i)
    weights.decoder[i] *= scales[i % scales.size()];
  for (const int sweeps : {0, 3}) {
    ValueCodecConfig config = codec_->config();
    config.polish_sweeps = sweeps;
    const auto plain = std::make_shared<ValueCodec>(config, codec_->weights());
    const std::vector<float> values = values_;
    codec_ = plain;
    encode();
    decode();
    const auto codes = codes_;
    const auto value_scales = scales_;
    const auto decoded = decoded_;
    for (std::size_t i = 0; i < values_.size(); ++i) values_[i] *= scales[i % scales.size()];
    codec_ = std::make_shared<ValueCodec>(config, weights);
    ASSERT_TRUE(codec_->is_scaled());
    encode();
    decode();
    EXPECT_EQ(codes_, codes);
    EXPECT_EQ(scales_, value_scales);
    for (std::size_t i = 0; i < decoded.size(); ++i)
      ASSERT_NEAR(decoded_[i], decoded[i] * scales[i % scales.size()], 1e-4 * 16) << i;
    values_ = values;
    codec_ = plain;
  }
}

TEST_P(ValueCodecTest, ChannelScalesMustBePositive) {
  ValueCodecWeights weights = codec_->weights();
  weights.channel_scales.assign(kChannels, 1.0f);
  weights.channel_scales[5] = 0.0f;
  EXPECT_THAT([&] { ValueCodec(codec_->config(), weights); },
              ThrowsMessage<Error>(AllOf(HasSubstr("channel_scales"), HasSubstr("channel 5"))));
  weights.channel_scales.pop_back();
  EXPECT_THROW(ValueCodec(codec_->config(), weights), Error);
}

TEST_P(ValueCodecTest, WeightsAreChecked) {
  ValueCodecWeights weights = codec_->weights();
  weights.decoder.pop_back();
  EXPECT_THROW(ValueCodec(codec_->config(), weights), Error);
  weights = codec_->weights();
  weights.output_bias[2] = std::numeric_limits<float>::infinity();
  EXPECT_THROW(ValueCodec(codec_->config(), weights), Error);
}

INSTANTIATE_TEST_SUITE_P(Bits, ValueCodecTest, testing::Values(1, 2));

TEST(GradedValueCodec, RowsAreExactMultiples) {
  Rng rng(5);
  for (const int blocks : {1, 3}) {
    const auto codec = testing_support::random_value_codec(rng, 48, 2, 8, blocks, true);
    const auto rows = codec->decoder();
    for (Index byte = 0; byte < rows.rows; byte += 8)
      for (Index c = 0; c < rows.cols; ++c) {
        EXPECT_EQ(rows(byte, c), 4 * rows(byte + 2, c));
        for (const Index bit : {1, 3, 5})
          EXPECT_EQ(rows(byte + bit, c), 2 * rows(byte + bit + 1, c));
      }
  }
}

TEST(GradedValueCodec, RefusesRowsThatAreNot) {
  Rng rng(5);
  const auto codec = testing_support::random_value_codec(rng, 32, 1, 8, 2, true);
  ValueCodecConfig config = codec->config();
  ValueCodecWeights weights = codec->weights();
  weights.decoder[(16 + 11) * 16 + 5] += 1e-3f;  // bit 11 of block 1, the upper bit of a number
  EXPECT_THAT([&] { ValueCodec(config, weights); },
              ThrowsMessage<Error>(AllOf(HasSubstr("not graded"), HasSubstr("block 1, channel 5"),
                                         HasSubstr("row of bit 11 is"),
                                         HasSubstr("2 times that of bit 12"))));
  config.graded = false;
  EXPECT_NO_THROW(ValueCodec(config, weights));
}

TEST(GradedValueCodec, CodesAsAnyOtherWithoutPolish) {
  constexpr Index kTokens = 50;
  Rng rng(6);
  const auto graded = testing_support::random_value_codec(rng, 32, 1, 8, 2, true);
  ValueCodecConfig config = graded->config();
  config.graded = false;
  const ValueCodec plain(config, graded->weights());
  EXPECT_NE(plain.digest(), graded->digest());
  const std::vector<float> values = testing_support::normal_floats(rng, kTokens * 32);
  const auto code = [&](const ValueCodec& codec) {
    std::vector<std::uint8_t> codes(kTokens * 4);
    std::vector<std::uint16_t> scales(kTokens * 2);
    std::vector<float> decoded(values.size());
    codec.encode(as_matrix(values, kTokens, 32), as_matrix(codes, kTokens, 4), scales.data());
    codec.decode(as_matrix(std::as_const(codes), kTokens, 4), scales.data(),
                 as_matrix(decoded, kTokens, 32));
    return std::tuple(codes, scales, decoded);
  };
  EXPECT_EQ(code(plain), code(*graded));
}

/// Block `b` of a codec as a codec by itself.
ValueCodec codec_of_block(const ValueCodec& codec, int b) {
  ValueCodecWeights weights;
  ValueCodecWeights::for_each([&](auto weight) {
    const std::vector<float>& all = codec.weights().*weight;
    const auto size = static_cast<std::ptrdiff_t>(all.size()) / codec.config().num_blocks;
    (weights.*weight).assign(all.begin() + b * size, all.begin() + (b + 1) * size);
  });
  return {codec.config().block(), std::move(weights)};
}

/// Codes, scales and decoded values of one codec.
struct Coded {
  std::vector<std::uint8_t> codes;
  std::vector<std::uint16_t> scales;
  std::vector<float> decoded;

  Coded(const ValueCodec& codec, MatrixView<const float> values)
      : codes(static_cast<std::size_t>(values.rows * codec.code_bytes())),
        scales(static_cast<std::size_t>(values.rows * codec.config().num_blocks)),
        decoded(static_cast<std::size_t>(values.rows * values.cols)) {
    const auto rows = as_matrix(codes, values.rows, codec.code_bytes());
    codec.encode(values, rows, scales.data());
    codec.decode(rows, scales.data(), as_matrix(decoded, values.rows, values.cols));
  }
};

TEST(ValueCodecBlocks, AreCodecsSideBySide) {
  constexpr int kChannels = 48, kBlocks = 3, kPerBlock = kChannels / kBlocks;
  constexpr Index kTokens = 130;
  Rng rng(21);
  std::vector<float> values = testing_support::normal_floats(rng, kTokens * kChannels, 2.0);
  std::fill_n(values.begin() + 9 * kChannels + kPerBlock, kPerBlock, 0.0f);  // block 1 of token 9
  const auto view = as_matrix(std::as_const(values), kTokens, kChannels);
  for (const int bits : {1, 2})
    for (const int sweeps : {0, 3})
      for (const bool scaled : {false, true}) {
        SCOPED_TRACE(testing::Message() << bits << " bits, " << sweeps << " sweeps, " << scaled);
        const auto plain = testing_support::random_value_codec(rng, kChannels, bits, 20, kBlocks);
        ValueCodecConfig config = plain->config();
        config.polish_sweeps = sweeps;
        ValueCodecWeights weights = plain->weights();
        if (scaled)
          for (int c = 0; c < kChannels; ++c)
            weights.channel_scales.push_back(0.5f + static_cast<float>(c % 5));
        const ValueCodec codec(config, weights);
        EXPECT_EQ(codec.bits_per_token(), kChannels * bits + kBlocks * 16);
        const Coded whole(codec, view);
        const auto whole_codes = as_matrix(whole.codes, kTokens, codec.code_bytes());
        const auto whole_scales = as_matrix(whole.scales, kTokens, kBlocks);
        const auto whole_decoded = as_matrix(whole.decoded, kTokens, kChannels);
        EXPECT_EQ(whole_scales(9, 1), 0);
        for (int b = 0; b < kBlocks; ++b) {
          const ValueCodec one = codec_of_block(codec, b);
          const Coded part(one, view.middle_cols(b * kPerBlock, kPerBlock));
          const auto decoder = codec.decoder().middle_rows(b * kPerBlock * bits, kPerBlock * bits);
          ASSERT_EQ(decoder.cols, one.decoder().cols);
          EXPECT_TRUE(std::equal(decoder.data, decoder.row(decoder.rows), one.decoder().data));
          for (Index t = 0; t < kTokens; ++t) {
            EXPECT_EQ(whole_scales(t, b), part.scales[static_cast<std::size_t>(t)]);
            EXPECT_TRUE(std::equal(whole_codes.row(t) + b * one.code_bytes(),
                                   whole_codes.row(t) + (b + 1) * one.code_bytes(),
                                   part.codes.data() + t * one.code_bytes()));
            EXPECT_TRUE(std::equal(whole_decoded.row(t) + b * kPerBlock,
                                   whole_decoded.row(t) + (b + 1) * kPerBlock,
                                   part.decoded.data() + t * kPerBlock));
          }
        }
      }
}

// Saved caches name their codecs by digests, which must not change from version to version.
TEST(ValueCodecDigest, OfOneBlockIsWhatItWasBeforeThereWereBlocks) {
  const ValueCodecConfig config{8, 1, 2, 3};
  float last = 0;
  const auto numbers = [&](int count) {
    std::vector<float> result;
    while (count-- > 0) result.push_back(last += 0.25f);
    return result;
  };
  ValueCodecWeights weights;
  weights.norm_gain = numbers(8);
  weights.norm_bias = numbers(8);
  weights.hidden_weight = numbers(16);
  weights.hidden_bias = numbers(2);
  weights.output_weight = numbers(32);
  weights.output_bias = numbers(16);
  weights.decoder = numbers(64);
  EXPECT_EQ(ValueCodec(config, weights).digest().to_text(), "adcac746f7c1aa57265805ea46124040");
}

TEST(ValueCodecBlocks, NameTokenAndChannelOfScalesBeyondRange) {
  Rng rng(22);
  const auto codec = testing_support::random_value_codec(rng, 32, 1, 8, 2);
  ValueCodecWeights weights = codec->weights();
  for (float& number : weights.decoder) number *= 1e-30f;
  std::vector<float> values = testing_support::normal_floats(rng, 5 * 32);
  values[3 * 32 + 20] = 1e20f;
  EXPECT_THAT([&] { Coded(ValueCodec(codec->config(), weights), as_matrix(values, 5, 32)); },
              ThrowsMessage<Error>(AllOf(HasSubstr("token 3"), HasSubstr("channel 20"))));
}

TEST(ValueCodecConfigTest, BlocksMustFit) {
  ValueCodecConfig config;
  config.num_channels = 64;
  for (const int blocks : {-1, 0, 3, 16, 65}) {
    config.num_blocks = blocks;
    EXPECT_THAT([&] { config.validate(); },
                ThrowsMessage<Error>(
                    AllOf(HasSubstr("num_blocks is " + std::to_string(blocks)), HasSubstr("64"))));
  }
  config.num_blocks = 8;
  EXPECT_NO_THROW(config.validate());
  EXPECT_EQ(config.block().num_channels, 8);
  EXPECT_EQ(config.block().repeated(8), config);
}

TEST(ValueCodecConfigTest, SpeedHasABlockPerHead) {
  const ValueCodecConfig one = ValueCodecConfig::speed_1bit(1024, 8);
  EXPECT_EQ(one.block(), ValueCodecConfig::commvq_1bit(128));
  EXPECT_EQ(one.num_blocks, 8);
  EXPECT_EQ(one.num_code_bits(), 1024);
  EXPECT_EQ(ValueCodecConfig::speed_2bit(1024, 8).block(), ValueCodecConfig::commvq_2bit(128));
  EXPECT_THAT([] { ValueCodecConfig::speed_1bit(1024, 3); },
              ThrowsMessage<Error>(AllOf(HasSubstr("num_kv_heads is 3"), HasSubstr("1024"))));
}

TEST(ValueCodecConfigTest, PresetsAndLimits) {
  EXPECT_EQ(ValueCodecConfig::paper_1bit(1024).num_code_bits(), 1024);
  EXPECT_EQ(ValueCodecConfig::paper_2bit(1024).num_code_bits(), 2048);
  ValueCodecConfig config;
  config.num_channels = 20;
  EXPECT_THAT([&] { config.validate(); }, ThrowsMessage<Error>(HasSubstr("20")));
  config.num_channels = 16;
  config.bits = 3;
  EXPECT_THAT([&] { config.validate(); }, ThrowsMessage<Error>(HasSubstr("3")));
  config.bits = 1;
  config.polish_sweeps = -1;
  EXPECT_THAT([&] { config.validate(); }, ThrowsMessage<Error>(HasSubstr("polish_sweeps is -1")));
  EXPECT_EQ(ValueCodecConfig::commvq_1bit(1024).num_code_bits(), 1024);
  EXPECT_TRUE(ValueCodecConfig::commvq_1bit(1024).graded);
  EXPECT_FALSE(ValueCodecConfig::paper_1bit(1024).graded);
  EXPECT_EQ(ValueCodecConfig::commvq_2bit(1024).num_code_bits(), 2048);
}

}  // namespace
}  // namespace commvq
