#include "commvq/learner/key_learner.hpp"

#include <cmath>
#include <limits>

#include <gmock/gmock.h>

#include "reference/key_reference.hpp"
#include "reference/random_cache.hpp"

namespace commvq {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

constexpr Index kTokens = 800;
constexpr int kHeadDim = 16;

/// Keys of unit length near some directions.
std::vector<float> clustered_keys(Index tokens = kTokens, int heads = 1) {
  testing_support::Rng rng(9);
  const Index channels = Index{heads} * kHeadDim;
  const std::vector<float> centres = testing_support::normal_floats(rng, 20 * channels);
  std::vector<float> keys = testing_support::normal_floats(rng, tokens * channels, 0.3);
  for (Index t = 0; t < tokens; ++t) {
    double size = 0;
    float* const key = &keys[static_cast<std::size_t>(t * channels)];
    for (Index c = 0; c < channels; ++c) {
      key[c] += centres[static_cast<std::size_t>(t % 20 * channels + c)];
      size += double(key[c]) * key[c];
    }
    for (Index c = 0; c < channels; ++c) key[c] /= static_cast<float>(std::sqrt(size));
  }
  return keys;
}

KeyLearnerOptions small_options(bool tied = true) {
  KeyLearnerOptions options;
  options.codec.pairs = {kHeadDim, kHeadDim, RopeLayout::kHalfSplit};
  options.codec.group_pairs = 8;
  options.codec.codebook_size = 8;
  options.codec.num_stages = 4;
  options.codec.tied = tied;
  options.max_steps = 15;
  return options;
}

/// Mean squared error of the greedy encoder.
double error_of(const KeyCodebook<float>& codebook, const std::vector<float>& keys, int beam = 1) {
  const auto tokens = static_cast<Index>(keys.size()) / kHeadDim;
  std::vector<std::uint16_t> codes(static_cast<std::size_t>(tokens * codebook.config.num_codes()));
  std::vector<float> errors(static_cast<std::size_t>(tokens));
  KeyEncoder<float>(codebook).encode(as_matrix(keys, tokens, kHeadDim), beam,
                                     as_matrix(codes, tokens, codebook.config.num_codes()),
                                     errors.data());
  double sum = 0;
  for (const float error : errors) sum += error;
  return sum / static_cast<double>(tokens);
}

TEST(KeyLearner, StagesKeepTheirBestStepAndAddUp) {
  const std::vector<float> keys = clustered_keys();
  KeyLearnerReport report;
  const auto codebook =
      learn_key_codebook(as_matrix(keys, kTokens, kHeadDim), small_options(), &report);
  ASSERT_EQ(report.stage_objectives.size(), 4u);
  double previous = 1.0;  // keys have unit length
  for (const auto& objectives : report.stage_objectives) {
    ASSERT_GE(objectives.size(), 2u);
    const double best = *std::min_element(objectives.begin(), objectives.end());
    EXPECT_LT(best, objectives.front());
    EXPECT_LT(best, previous);
    previous = best;
  }
  EXPECT_NEAR(error_of(codebook, keys), previous, 1e-4 * previous);
}

TEST(KeyLearner, TiedBooksAreTied) {
  const std::vector<float> keys = clustered_keys();
  auto codebook = learn_key_codebook(as_matrix(keys, kTokens, kHeadDim), small_options());
  const auto rows = codebook.rows;
  codebook.derive_tied_books();
  EXPECT_EQ(rows, codebook.rows);
  codebook = learn_key_codebook(as_matrix(keys, kTokens, kHeadDim), small_options(false));
  const auto untied = codebook.rows;
  codebook.derive_tied_books();
  EXPECT_NE(untied, codebook.rows);
}

TEST(KeyLearner, UntiedBooksFitBetter) {
  const std::vector<float> keys = clustered_keys();
  const auto error = [&](bool tied) {
    return error_of(learn_key_codebook(as_matrix(keys, kTokens, kHeadDim), small_options(tied)), keys);
  };
  EXPECT_LT(error(false), error(true));
}

/// Mean of |k_i - decoded_i|^2 times the squared weights, with the codebook's own encoder.
double weighted_error_of(KeyCodebook<float> codebook, const std::vector<float>& keys,
                         const std::vector<float>& weights) {
  const KeyEncoder<float> encoder(codebook);
  codebook.pair_weights = weights;
  std::vector<std::uint16_t> codes(static_cast<std::size_t>(kTokens * codebook.config.num_codes()));
  encoder.encode(as_matrix(keys, kTokens, kHeadDim), 8,
                 as_matrix(codes, kTokens, codebook.config.num_codes()));
  double sum = 0;
  for (std::size_t t = 0; t < static_cast<std::size_t>(kTokens); ++t)
    sum +=
        reference::squared_error(codebook, &keys[t * kHeadDim],
                                 &codes[t * static_cast<std::size_t>(codebook.config.num_codes())]);
  return sum / static_cast<double>(kTokens);
}

TEST(KeyLearner, WeightsLowerTheWeightedError) {
  const std::vector<float> keys = clustered_keys();
  const std::vector<float> weights = {0.1f, 0.1f, 2.0f, 1.0f, 0.1f, 0.1f, 0.5f, 0.1f};
  for (const bool tied : {true, false}) {
    KeyLearnerOptions options = small_options(tied);
    options.refinement.rounds = 2;
    const auto plain = learn_key_codebook(as_matrix(keys, kTokens, kHeadDim), options);
    options.pair_weights = weights;
    KeyLearnerReport report;
    const auto weighted = learn_key_codebook(as_matrix(keys, kTokens, kHeadDim), options, &report);
    EXPECT_EQ(weighted.pair_weights, weights);
    const double error = weighted_error_of(weighted, keys, weights);
    EXPECT_LT(error, 0.5 * weighted_error_of(plain, keys, weights));
    EXPECT_NEAR(error, report.refinement_objectives.back(), 0.05 * error);
  }
}

TEST(KeyLearner, WeightsOfALayerGoToTheirHeads) {
  const std::vector<float> keys = clustered_keys(kTokens, 2);
  KeyLearnerOptions options = small_options();
  for (int i = 0; i < kHeadDim; ++i) options.pair_weights.push_back(1.0f + static_cast<float>(i));
  const KeyCodec codec = learn_key_codec(as_matrix(keys, kTokens, 2 * kHeadDim), options);
  EXPECT_EQ(codec.codebook(0).pair_weights.front(), 1.0f);
  EXPECT_EQ(codec.codebook(1).pair_weights.front(), 9.0f);
  options.pair_weights.pop_back();
  EXPECT_THAT([&] { learn_key_codec(as_matrix(keys, kTokens, 2 * kHeadDim), options); },
              ThrowsMessage<Error>(HasSubstr("15 pair weights")));
}

TEST(KeyLearner, SameSeedAndThreadsGiveTheSameCodebook) {
  const std::vector<float> keys = clustered_keys();
  KeyLearnerOptions options = small_options();
  options.refinement.rounds = 2;
  const auto rows = [&] {
    return learn_key_codebook(as_matrix(keys, kTokens, kHeadDim), options).rows;
  };
  const auto first = rows();
  EXPECT_EQ(first, rows());
  options.seed = 2;
  EXPECT_NE(first, rows());
}

TEST(KeyLearner, FewerKeysThanCentroids) {
  const std::vector<float> keys = clustered_keys(5);
  KeyLearnerOptions options = small_options();
  options.refinement.rounds = 1;
  const auto codebook = learn_key_codebook(as_matrix(keys, 5, kHeadDim), options);
  for (const float number : codebook.rows) EXPECT_TRUE(std::isfinite(number));
  EXPECT_LT(error_of(codebook, keys), 0.05);
}

/// Relative squared error of a head's key after coding, mean over tokens and heads that are not
/// zero.
double relative_error_of(const KeyCodec& codec, const std::vector<float>& keys, Index tokens) {
  const Index num_codes = Index{codec.num_kv_heads()} * codec.config().num_codes();
  const Index channels = Index{codec.num_kv_heads()} * kHeadDim;
  std::vector<std::uint16_t> codes(static_cast<std::size_t>(tokens * num_codes));
  std::vector<std::uint16_t> norms(static_cast<std::size_t>(tokens * codec.num_norms()));
  std::vector<float> decoded(keys.size());
  codec.encode(as_matrix(keys, tokens, channels), as_matrix(codes, tokens, num_codes),
               norms.data());
  codec.decode(as_matrix(codes, tokens, num_codes), norms.data(),
               as_matrix(decoded, tokens, channels));
  double sum = 0, count = 0;
  for (std::size_t first = 0; first < keys.size(); first += kHeadDim) {
    double error = 0, size = 0;
    for (std::size_t i = first; i < first + kHeadDim; ++i) {
      error += std::pow(keys[i] - decoded[i], 2);
      size += std::pow(keys[i], 2);
    }
    if (size == 0) continue;
    sum += error / size;
    ++count;
  }
  return sum / count;
}

TEST(KeyLearner, LayerLearnsEveryHeadAndSkipsZeroKeys) {
  std::vector<float> keys = clustered_keys(kTokens, 2);
  std::fill_n(keys.begin(), 3 * 2 * kHeadDim, 0.0f);
  for (float& key : keys) key *= 50;
  std::vector<KeyLearnerReport> reports;
  const KeyCodec codec =
      learn_key_codec(as_matrix(keys, kTokens, 2 * kHeadDim), small_options(), &reports);
  EXPECT_EQ(codec.num_kv_heads(), 2);
  EXPECT_EQ(reports.size(), 2u);
  EXPECT_LT(relative_error_of(codec, keys, kTokens), 0.2);
}

TEST(KeyLearner, NormPerHeadFitsHeadsWhoseLengthsVary) {
  std::vector<float> keys = clustered_keys(kTokens, 2);
  for (Index t = 0; t < kTokens; ++t)
    for (int c = 0; c < kHeadDim; ++c)
      keys[static_cast<std::size_t>(t * 2 * kHeadDim + c)] *=
          std::ldexp(1.0f, static_cast<int>(t % 7));
  KeyLearnerOptions options = small_options();
  const KeyCodec per_token = learn_key_codec(as_matrix(keys, kTokens, 2 * kHeadDim), options);
  options.codec.norm_per_head = true;
  const KeyCodec per_head = learn_key_codec(as_matrix(keys, kTokens, 2 * kHeadDim), options);
  EXPECT_LT(relative_error_of(per_head, keys, kTokens),
            0.5 * relative_error_of(per_token, keys, kTokens));
}

TEST(KeyLearner, AHeadOfZerosLearnsZeros) {
  std::vector<float> keys = clustered_keys(kTokens, 2);
  for (Index t = 0; t < kTokens; ++t)
    std::fill_n(&keys[static_cast<std::size_t>(t * 32)], 16, 0.0f);
  KeyLearnerOptions options = small_options();
  options.codec.norm_per_head = true;
  const KeyCodec codec = learn_key_codec(as_matrix(keys, kTokens, 2 * kHeadDim), options);
  for (const float number : codec.codebook(0).rows) EXPECT_EQ(number, 0.0f);
  EXPECT_LT(relative_error_of(codec, keys, kTokens), 0.2);
}

// At the same stages: what the library adds to the paper's learner must leave less error.
TEST(KeyLearner, OwnPresetBeatsThePapers) {
  testing_support::Rng rng(5);
  std::vector<float> keys = testing_support::normal_floats(rng, kTokens * 2 * kHeadDim);
  for (std::size_t i = 0; i < keys.size(); ++i) keys[i] *= 1.0f / static_cast<float>(1 + i % 16);
  const auto error = [&](KeyLearnerOptions options) {
    options.codec.codebook_size = 8;
    options.codec.num_stages = 3;
    return relative_error_of(learn_key_codec(as_matrix(keys, kTokens, 2 * kHeadDim), options), keys,
                             kTokens);
  };
  const PairLayout pairs = small_options().codec.pairs;
  const double paper = error(KeyLearnerOptions::paper(KeyCodecConfig::paper_1bit(pairs)));
  EXPECT_EQ(KeyLearnerOptions::commvq(KeyCodecConfig::commvq_1bit(pairs)).stages_per_decade, 4);
  EXPECT_EQ(KeyLearnerOptions::commvq(KeyCodecConfig::speed_1bit(pairs)).stages_per_decade, 24);
  const double own = error(KeyLearnerOptions::commvq(KeyCodecConfig::commvq_1bit(pairs)));
  EXPECT_LT(own, 0.8 * paper);
}

/// Normal keys whose channels are correlated: variances fall along random axes.
std::vector<float> correlated_keys(testing_support::Rng& rng, Index tokens, Index channels) {
  const std::vector<float> axes = testing_support::normal_floats(rng, channels * channels);
  std::vector<float> keys(static_cast<std::size_t>(tokens * channels), 0.0f);
  for (Index t = 0; t < tokens; ++t) {
    const std::vector<float> parts = testing_support::normal_floats(rng, channels, 0.1);
    for (Index a = 0; a < channels; ++a)
      for (Index c = 0; c < channels; ++c)
        keys[static_cast<std::size_t>(t * channels + c)] +=
            parts[static_cast<std::size_t>(a)] / static_cast<float>(1 + a) *
            axes[static_cast<std::size_t>(a * channels + c)];
  }
  return keys;
}

TEST(KeyLearner, GradedRowsAreExactAndFitAboutAsWellAsFreeOnes) {
  testing_support::Rng rng(11);
  const std::vector<float> keys = correlated_keys(rng, 2000, kHeadDim);
  const std::vector<float> weights = {0.1f, 0.3f, 2.0f, 1.0f, 0.7f, 0.9f, 0.5f, 0.3f};
  const auto error = [&](bool graded) {
    KeyCodecConfig codec = KeyCodecConfig::speed_1bit(small_options().codec.pairs);
    codec.num_stages = 8;  // a bit a channel
    codec.graded = graded;
    KeyLearnerOptions options = KeyLearnerOptions::commvq(codec);
    options.pair_weights = weights;
    KeyLearnerReport report;
    const auto codebook = learn_key_codebook(as_matrix(keys, 2000, kHeadDim), options, &report);
    EXPECT_EQ(report.stage_objectives.empty(), graded);
    if (graded) {
      EXPECT_NO_THROW(KeyCodec({codebook}));
    }
    return error_of(codebook, keys, 8);
  };
  EXPECT_LT(error(true), 1.15 * error(false));
}

TEST(KeyLearner, ReportsProgress) {
  const std::vector<float> keys = clustered_keys();
  KeyLearnerOptions options = small_options();
  options.refinement.rounds = 2;
  double last = 0;
  options.progress = [&](const Progress& progress) {
    EXPECT_GE(progress.fraction, last);
    last = progress.fraction;
  };
  learn_key_codebook(as_matrix(keys, kTokens, kHeadDim), options);
  EXPECT_DOUBLE_EQ(last, 1.0);
}

TEST(KeyLearner, BadInputIsNamed) {
  std::vector<float> keys = clustered_keys();
  const auto learn = [&](KeyLearnerOptions options) {
    return [&keys, options] {
      learn_key_codebook(as_matrix(std::as_const(keys), kTokens, kHeadDim), options);
    };
  };
  KeyLearnerOptions options = small_options();
  options.max_steps = 0;
  EXPECT_THAT(learn(options), ThrowsMessage<Error>(HasSubstr("max_steps")));
  options = small_options();
  options.last_temperature = -1;
  EXPECT_THAT(learn(options), ThrowsMessage<Error>(HasSubstr("-1")));
  options = small_options();
  options.codec.pairs = {32, 32, RopeLayout::kHalfSplit};
  EXPECT_THAT(learn(options), ThrowsMessage<Error>(HasSubstr("32")));
  keys[100] = std::numeric_limits<float>::infinity();
  EXPECT_THROW(learn(small_options())(), Error);
  EXPECT_THROW(learn_key_codebook({keys.data(), 0, kHeadDim}, small_options()), Error);
  std::vector<float> zeros(static_cast<std::size_t>(kTokens) * kHeadDim);
  EXPECT_THROW(learn_key_codec(as_matrix(zeros, kTokens, kHeadDim), small_options()), Error);
}

}  // namespace
}  // namespace commvq
