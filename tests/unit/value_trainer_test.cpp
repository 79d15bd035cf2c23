#include "commvq/learner/value_trainer.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include <gmock/gmock.h>

#include "reference/random_cache.hpp"

namespace commvq {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

constexpr Index kTokens = 600;
constexpr int kChannels = 32;

/// Values near one of a few directions, which some bits can tell apart.
std::vector<float> clustered_values() {
  testing_support::Rng rng(2);
  const std::vector<float> centres = testing_support::normal_floats(rng, 12 * kChannels);
  std::vector<float> values = testing_support::normal_floats(rng, kTokens * kChannels, 0.3);
  for (std::size_t t = 0; t < kTokens; ++t)
    for (std::size_t c = 0; c < kChannels; ++c)
      values[t * kChannels + c] += centres[t % 12 * kChannels + c];
  return values;
}

ValueTrainerOptions options_for(int bits) {
  ValueTrainerOptions options;
  options.codec = ValueCodecConfig::paper_1bit(kChannels);
  options.codec.bits = bits;
  options.steps = 400;
  options.batch_tokens = 64;
  return options;
}

double relative_error(const ValueCodec& codec, const std::vector<float>& values) {
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(kTokens * codec.code_bytes()));
  std::vector<std::uint16_t> scales(kTokens);
  std::vector<float> decoded(values.size());
  codec.encode(as_matrix(values, kTokens, kChannels), as_matrix(codes, kTokens, codec.code_bytes()),
               scales.data());
  codec.decode(as_matrix(std::as_const(codes), kTokens, codec.code_bytes()), scales.data(),
               as_matrix(decoded, kTokens, kChannels));
  double error = 0, size = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    error += std::pow(values[i] - decoded[i], 2);
    size += std::pow(values[i], 2);
  }
  return error / size;
}

TEST(ValueTrainer, LearnsAndMoreBitsLearnMore) {
  const std::vector<float> values = clustered_values();
  ValueTrainerReport report;
  const auto train = [&](int bits) {
    return relative_error(
        train_value_codec(as_matrix(values, kTokens, kChannels), options_for(bits), &report),
        values);
  };
  const double one = train(1);
  ASSERT_EQ(report.objectives.size(), 400u);
  EXPECT_LT(one, 0.5 * report.objectives.front());
  EXPECT_LT(train(2), one);
}

TEST(ValueTrainer, RefinementLowersTheError) {
  const std::vector<float> values = clustered_values();
  for (const int sweeps : {0, 8}) {
    ValueTrainerOptions options = options_for(1);
    options.codec.polish_sweeps = sweeps;
    options.steps = 40;
    options.refinement.rounds = 4;
    ValueTrainerReport report;
    const ValueCodec codec =
        train_value_codec(as_matrix(values, kTokens, kChannels), options, &report);
    ASSERT_EQ(report.refinement_objectives.size(), 5u);
    const auto& errors = report.refinement_objectives;
    const double best = *std::min_element(errors.begin(), errors.end());
    EXPECT_LT(best, 0.8 * errors.front()) << sweeps << " sweeps";
    EXPECT_NEAR(relative_error(codec, values), best, 0.1 * best) << sweeps << " sweeps";
  }
}

// In an eighth of the steps.
TEST(ValueTrainer, OwnPresetBeatsThePapers) {
  const std::vector<float> values = clustered_values();
  const auto error = [&](ValueTrainerOptions options, int steps) {
    options.steps = steps;
    options.batch_tokens = 64;
    return relative_error(train_value_codec(as_matrix(values, kTokens, kChannels), options),
                          values);
  };
  const double paper =
      error(ValueTrainerOptions::paper(ValueCodecConfig::paper_1bit(kChannels)), 400);
  const double own =
      error(ValueTrainerOptions::commvq(ValueCodecConfig::commvq_1bit(kChannels)), 50);
  EXPECT_LT(own, 0.9 * paper);
}

/// Values with strong and weak directions, about a mean.
std::vector<float> correlated_values() {
  testing_support::Rng rng(4);
  const std::vector<float> axes = testing_support::normal_floats(rng, kChannels * kChannels);
  std::vector<float> values(kTokens * kChannels, 0.5f);
  for (std::size_t t = 0; t < kTokens; ++t)
    for (std::size_t a = 0; a < kChannels; ++a) {
      const float part = testing_support::normal_floats(rng, 1, 1 / double(1 + a))[0];
      for (std::size_t c = 0; c < kChannels; ++c)
        values[t * kChannels + c] += part * axes[a * kChannels + c];
    }
  return values;
}

// The constructor of the codec checks the rows.
TEST(ValueTrainer, GradedCodecsAreAboutAsGoodAsFreeOnes) {
  const std::vector<float> values = correlated_values();
  for (const int bits : {1, 2}) {
    ValueTrainerOptions options =
        ValueTrainerOptions::commvq(bits == 1 ? ValueCodecConfig::commvq_1bit(kChannels)
                                              : ValueCodecConfig::commvq_2bit(kChannels));
    options.steps = 200;
    options.batch_tokens = 64;
    const auto error = [&](bool graded) {
      options.codec.graded = graded;
      ValueTrainerReport report;
      const ValueCodec codec =
          train_value_codec(as_matrix(values, kTokens, kChannels), options, &report);
      EXPECT_EQ(codec.config().graded, graded);
      const auto& errors = report.refinement_objectives;
      EXPECT_LT(*std::min_element(errors.begin(), errors.end()), 0.97 * errors.front());
      return relative_error(codec, values);
    };
    EXPECT_LT(error(true), 1.15 * error(false)) << bits << " bits";
  }
}

TEST(ValueTrainer, SameSeedGivesTheSameWeights) {
  const std::vector<float> values = clustered_values();
  ValueTrainerOptions options = options_for(1);
  options.steps = 20;
  const auto decoder = [&] {
    return train_value_codec(as_matrix(values, kTokens, kChannels), options).weights().decoder;
  };
  const auto first = decoder();
  EXPECT_EQ(first, decoder());
  options.seed = 2;
  EXPECT_NE(first, decoder());
}

TEST(ValueTrainer, BlocksAreTrainedByThemselves) {
  constexpr int kBlocks = 2, kPerBlock = kChannels / kBlocks;
  const std::vector<float> values = clustered_values();
  const auto view = as_matrix(values, kTokens, kChannels);
  ValueTrainerOptions options =
      ValueTrainerOptions::commvq(ValueCodecConfig::commvq_1bit(kPerBlock).repeated(kBlocks));
  options.steps = 10;
  options.refinement.rounds = 2;
  ValueTrainerReport report;
  const ValueCodec whole = train_value_codec(view, options, &report);
  EXPECT_EQ(report.objectives.size(), 20u);
  EXPECT_EQ(report.refinement_objectives.size(), 6u);
  EXPECT_EQ(train_value_codec(view, options).digest(), whole.digest());
  ValueCodecWeights joined;
  options.codec = options.codec.block();
  for (int b = 0; b < kBlocks; ++b) {
    const ValueCodec one = train_value_codec(view.middle_cols(b * kPerBlock, kPerBlock), options);
    ValueCodecWeights::for_each([&](auto weight) {
      const std::vector<float>& part = one.weights().*weight;
      (joined.*weight).insert((joined.*weight).end(), part.begin(), part.end());
    });
  }
  EXPECT_EQ(ValueCodec(whole.config(), joined).digest(), whole.digest());
}

TEST(ValueTrainer, ZeroValuesAreLeftOut) {
  std::vector<float> values = clustered_values();
  std::fill_n(values.begin(), 100 * kChannels, 0.0f);
  ValueTrainerOptions options = options_for(1);
  options.steps = 5;
  EXPECT_NO_THROW(train_value_codec(as_matrix(values, kTokens, kChannels), options));
  for (Index t = 0; t < kTokens; ++t)
    std::fill_n(values.begin() + t * kChannels + kChannels / 2, kChannels / 2, 0.0f);
  options.codec.num_blocks = 2;
  EXPECT_THAT(
      [&] { train_value_codec(as_matrix(std::as_const(values), kTokens, kChannels), options); },
      ThrowsMessage<Error>(HasSubstr("channels [16, 32)")));
  std::fill(values.begin(), values.end(), 0.0f);
  options.codec.num_blocks = 1;
  EXPECT_THROW(train_value_codec(as_matrix(values, kTokens, kChannels), options), Error);
}

TEST(ValueTrainer, ReportsProgress) {
  const std::vector<float> values = clustered_values();
  ValueTrainerOptions options = options_for(1);
  options.steps = 10;
  options.refinement.rounds = 2;
  for (const int num_blocks : {1, 2}) {
    options.codec.num_blocks = num_blocks;
    double last = 0;
    options.progress = [&](const Progress& progress) {
      EXPECT_GE(progress.fraction, last);
      last = progress.fraction;
    };
    train_value_codec(as_matrix(values, kTokens, kChannels), options);
    EXPECT_DOUBLE_EQ(last, 1.0);
  }
}

TEST(ValueTrainer, BadInputIsNamed) {
  std::vector<float> values = clustered_values();
  const auto train = [&](ValueTrainerOptions options) {
    return [&values, options] {
      train_value_codec(as_matrix(std::as_const(values), kTokens, kChannels), options);
    };
  };
  ValueTrainerOptions options = options_for(1);
  options.steps = 0;
  EXPECT_THAT(train(options), ThrowsMessage<Error>(HasSubstr("steps")));
  options = options_for(1);
  options.learning_rate = -1;
  EXPECT_THAT(train(options), ThrowsMessage<Error>(HasSubstr("-1")));
  options = options_for(1);
  options.codec.num_channels = 64;
  EXPECT_THAT(train(options), ThrowsMessage<Error>(HasSubstr("64")));
  options = options_for(1);
  options.refinement.ridge = 0;
  EXPECT_THAT(train(options), ThrowsMessage<Error>(HasSubstr("refinement.ridge")));
  values[17] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(train(options_for(1))(), Error);
  EXPECT_THROW(train_value_codec({values.data(), 0, kChannels}, options_for(1)), Error);
}

}  // namespace
}  // namespace commvq
