#include "commvq/rope/rope.hpp"

#include <cmath>
#include <numbers>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace commvq {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Lt;
using testing::SizeIs;
using testing::ThrowsMessage;

constexpr const char* kSmallModel =
    R"("hidden_size": 256, "num_attention_heads": 4, "rope_theta": 10000.0)";

RopeConfig parse(const std::string& fields) {
  return parse_hf_rope("{" + fields + "}");
}

std::string with(const std::string& more) {
  return std::string(kSmallModel) + ", " + more;
}

TEST(ParseHfRope, ReadsAPlainModel) {
  const RopeConfig rope = parse(kSmallModel);
  EXPECT_EQ(rope.pairs.head_dim, 64);
  EXPECT_EQ(rope.pairs.rotary_dim, 64);
  EXPECT_EQ(rope.pairs.layout, RopeLayout::kHalfSplit);
  EXPECT_EQ(rope.theta, 10000.0);
  EXPECT_EQ(rope.scaling, RopeScaling::kNone);
}

TEST(ParseHfRope, ReadsHeadDimThetaAndPartialRotation) {
  const RopeConfig rope = parse(
      R"("head_dim": 96, "hidden_size": 100, "rope_theta": 5e5, "partial_rotary_factor": 0.5)");
  EXPECT_EQ(rope.pairs.head_dim, 96);
  EXPECT_EQ(rope.pairs.rotary_dim, 48);
  EXPECT_EQ(rope.theta, 5e5);
}

TEST(ParseHfRope, TakesNullAndDefaultAsNoScaling) {
  EXPECT_EQ(parse(with(R"("rope_scaling": null)")).scaling, RopeScaling::kNone);
  EXPECT_EQ(parse(with(R"("rope_scaling": {"rope_type": "default"})")).scaling, RopeScaling::kNone);
}

TEST(ParseHfRope, ReadsLinearScalingUnderBothNames) {
  for (const char* key : {"rope_type", "type"}) {
    const RopeConfig rope =
        parse(with(R"("rope_scaling": {")" + std::string(key) + R"(": "linear", "factor": 4})"));
    EXPECT_EQ(rope.scaling, RopeScaling::kLinear);
    EXPECT_EQ(rope.factor, 4.0);
  }
}

constexpr const char* kLlama31 =
    R"("head_dim": 128, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3",
       "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
       "original_max_position_embeddings": 8192})";

TEST(ParseHfRope, ReadsLlama3Scaling) {
  const RopeConfig rope = parse(kLlama31);
  EXPECT_EQ(rope.scaling, RopeScaling::kLlama3);
  EXPECT_EQ(rope.factor, 8.0);
  EXPECT_EQ(rope.low_freq_factor, 1.0);
  EXPECT_EQ(rope.high_freq_factor, 4.0);
  EXPECT_EQ(rope.original_max_position, 8192.0);
}

TEST(ParseHfRope, ReadsTheNewerRopeParameters) {
  const RopeConfig rope = parse(
      R"("head_dim": 64, "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 7e4})");
  EXPECT_EQ(rope.scaling, RopeScaling::kLinear);
  EXPECT_EQ(rope.theta, 7e4);
}

TEST(ParseHfRope, NamesTheTypeItDoesNotKnow) {
  for (const std::string type : {"yarn", "dynamic", "longrope"})
    EXPECT_THAT(
        [&] { parse(with(R"("rope_scaling": {"rope_type": ")" + type + R"(", "factor": 4})")); },
        ThrowsMessage<Error>(AllOf(HasSubstr(type), HasSubstr("llama3"))));
}

TEST(ParseHfRope, NamesTheFieldThatIsWrong) {
  const auto refuses = [](const std::string& fields, const char* name) {
    SCOPED_TRACE(fields);
    EXPECT_THAT([&] { parse(fields); }, ThrowsMessage<Error>(HasSubstr(name)));
  };
  refuses(R"("num_attention_heads": 4)", "hidden_size");
  refuses(R"("hidden_size": 255, "num_attention_heads": 4)", "255");
  refuses(R"("head_dim": 63)", "63");
  refuses(R"("head_dim": 1e9)", "head_dim");
  refuses(R"("head_dim": "64")", "head_dim");
  refuses(R"("head_dim": 64, "rope_theta": 0.5)", "0.5");
  refuses(R"("head_dim": 64, "rope_theta": "big")", "rope_theta");
  refuses(R"("head_dim": 64, "partial_rotary_factor": 1.5)", "1.5");
  refuses(with(R"("rope_scaling": "linear")"), "rope_scaling");
  refuses(with(R"("rope_scaling": {"rope_type": 3})"), "rope_type");
  refuses(with(R"("rope_scaling": {"rope_type": "linear"})"), "factor");
  refuses(with(R"("rope_scaling": {"rope_type": "linear", "factor": 0.5})"), "0.5");
  refuses(with(R"("rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
                   "high_freq_factor": 1, "original_max_position_embeddings": 8192})"),
          "high_freq_factor");
  refuses(with(R"("rope_scaling": {"rope_type": "llama3", "factor": 8})"), "low_freq_factor");
  EXPECT_THAT([] { parse_hf_rope("[1, 2]"); }, ThrowsMessage<Error>(HasSubstr("JSON object")));
  EXPECT_THAT([] { parse_hf_rope("{\"head_dim\": "); },
              ThrowsMessage<Error>(HasSubstr("not valid JSON at byte 14")));
}

// Printing such a value for a message would end the program for want of stack.
TEST(ParseHfRope, RefusesDeepNestingAndQuotesShort) {
  const std::string deep = "{\"head_dim\": " + std::string(100000, '[');
  EXPECT_THAT([&] { parse_hf_rope(deep); }, ThrowsMessage<Error>(HasSubstr("nested deeper")));
  const std::string type = std::string(100000, 'x') + "\\u001b";
  const auto long_type = [&] {
    parse_hf_rope(R"({"head_dim": 8, "rope_scaling": {"type": ")" + type + "\"}}");
  };
  EXPECT_THAT(long_type,
              ThrowsMessage<Error>(AllOf(HasSubstr("RoPE type \"xxx"), SizeIs(Lt(400u)))));
}

TEST(Rope, FrequenciesFallGeometricallyAndStopAtTheRotaryDimension) {
  RopeConfig config;
  config.theta = 500000.0;
  config.pairs.head_dim = 128;
  config.pairs.rotary_dim = 64;
  const Rope rope(config);
  EXPECT_EQ(rope.frequency(0), 1.0);
  for (int pair = 1; pair < 32; ++pair)
    EXPECT_NEAR(rope.frequency(pair) / rope.frequency(pair - 1), std::exp(-std::log(5e5) / 32),
                1e-12);
  for (int pair = 32; pair < 64; ++pair) EXPECT_EQ(rope.frequency(pair), 0.0);
}

TEST(Rope, LinearScalingDividesEveryFrequency) {
  RopeConfig plain, stretched;
  stretched.scaling = RopeScaling::kLinear;
  stretched.factor = 4;
  for (int pair = 0; pair < plain.pairs.num_pairs(); ++pair)
    EXPECT_DOUBLE_EQ(Rope(stretched).frequency(pair), Rope(plain).frequency(pair) / 4);
}

// Stated by wavelength, as in Meta's description; the library computes in turns.
TEST(Rope, Llama3ScalingKeepsShortWavesAndStretchesLongOnes) {
  const RopeConfig config = parse(kLlama31);
  RopeConfig plain = config;
  plain.scaling = RopeScaling::kNone;
  int kept = 0, smooth = 0, stretched = 0;
  for (int pair = 0; pair < 64; ++pair) {
    const double before = Rope(plain).frequency(pair);
    const double after = Rope(config).frequency(pair);
    const double wavelength = 2 * std::acos(-1.0) / before;
    if (wavelength < 8192.0 / 4) {
      EXPECT_EQ(after, before);
      ++kept;
    } else if (wavelength > 8192.0) {
      EXPECT_DOUBLE_EQ(after, before / 8);
      ++stretched;
    } else {
      const double s = (8192.0 / wavelength - 1) / (4 - 1);
      EXPECT_NEAR(after, (1 - s) * before / 8 + s * before, 1e-15);
      ++smooth;
    }
  }
  EXPECT_GT(kept, 20);
  EXPECT_GT(smooth, 3);
  EXPECT_GT(stretched, 20);
}

TEST(Rope, RefusesRowsThatAreNotWholeHeads) {
  RopeConfig config;
  std::vector<float> row(200);
  EXPECT_THAT([&] { Rope(config).apply(as_matrix(row, 1, 200), 0); },
              ThrowsMessage<Error>(AllOf(HasSubstr("200"), HasSubstr("128"))));
}

/// Position times frequency, reduced to one turn in long double.
long double phase_of(Index position, long double frequency) {
  return std::fmod(static_cast<long double>(position) * frequency,
                   2 * std::numbers::pi_v<long double>);
}

/// Frequencies from their definition, in long double.
long double frequency_of(const RopeConfig& config, int pair) {
  const long double exponent = -2.0L * pair / config.pairs.rotary_dim;
  long double frequency = std::pow(static_cast<long double>(config.theta), exponent);
  if (config.scaling == RopeScaling::kNone) return frequency;
  const long double stretched = frequency / config.factor;
  if (config.scaling == RopeScaling::kLinear) return stretched;
  const long double wavelength = 2 * std::numbers::pi_v<long double> / frequency;
  const long double turns = config.original_max_position / wavelength;
  const long double low = config.low_freq_factor, high = config.high_freq_factor;
  if (turns < low) return stretched;
  if (turns > high) return frequency;
  const long double share = (turns - low) / (high - low);
  return (1 - share) * stretched + share * frequency;
}

// Floats count single tokens up to 2^24 and single radians not much further.
TEST(Rope, KeepsThePhaseAtEveryPosition) {
  const std::vector<Index> positions = {1,
                                        4095,
                                        (1 << 20) - 1,
                                        1 << 20,
                                        (1 << 24) - 1,
                                        (1 << 24) + 1,
                                        (1 << 24) + 3,
                                        (Index{1} << 31) + 1,
                                        (Index{1} << 32) + 1};
  for (const RopeScaling scaling : {RopeScaling::kNone, RopeScaling::kLinear, RopeScaling::kLlama3})
    for (const double theta : {1e4, 5e5, 1e6}) {
      RopeConfig config;
      config.theta = theta;
      config.scaling = scaling;
      if (scaling != RopeScaling::kNone) config.factor = 8;
      const Rope rope(config);
      const int num_pairs = config.pairs.num_pairs();
      std::vector<double> rotation(static_cast<std::size_t>(2 * num_pairs));
      std::vector<float> float_rotation(rotation.size());
      for (const Index position : positions) {
        rope.rotation_at(position, rotation.data());
        rope.rotation_at(position, float_rotation.data());
        // Frequency and product round to 53 bits, so the angle's error grows with the position.
        const double tolerance = 4e-16 * static_cast<double>(position) + 4e-16;
        for (int pair = 0; pair < num_pairs; ++pair) {
          const long double phase = phase_of(position, frequency_of(config, pair));
          const auto at = static_cast<std::size_t>(pair);
          const auto sine = static_cast<std::size_t>(pair + num_pairs);
          ASSERT_NEAR(rotation[at], static_cast<double>(std::cos(phase)), tolerance)
              << "pair " << pair << " at " << position;
          ASSERT_NEAR(rotation[sine], static_cast<double>(std::sin(phase)), tolerance);
          ASSERT_EQ(float_rotation[at], static_cast<float>(rotation[at]));
          ASSERT_EQ(float_rotation[sine], static_cast<float>(rotation[sine]));
        }
      }
    }
}

}  // namespace
}  // namespace commvq
