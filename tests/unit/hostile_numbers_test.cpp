// Numbers that no calibration should meet: NaN, infinity, denormals, zeros, numbers near the end of
// float's range, equal keys, fewer tokens than centroids, none. Each ends in a result that is
// stated here or in an Error that names the number.
#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "commvq/attention/attention.hpp"
#include "commvq/core/float16.hpp"
#include "commvq/learner/key_learner.hpp"
#include "commvq/learner/query_statistics.hpp"
#include "commvq/learner/value_trainer.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "reference/random_cache.hpp"

namespace commvq {
namespace {

using testing::AllOf;
using testing::Each;
using testing::HasSubstr;
using testing_support::normal_floats;
using testing_support::random_key_codec;
using testing_support::random_value_codec;
using testing_support::Rng;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kDenormal = std::numeric_limits<float>::denorm_min();
constexpr int kHeads = 2;
constexpr Index kHeadDim = 8, kChannels = kHeads * kHeadDim;

MATCHER(IsFinite, "") {
  return std::isfinite(arg);
}

std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "(no error)";
}

KeyCodecConfig key_config(bool norm_per_head = false, int beam_width = 1) {
  KeyCodecConfig config;
  config.pairs = {kHeadDim, kHeadDim, RopeLayout::kHalfSplit};
  config.group_pairs = 2;
  config.codebook_size = 4;
  config.num_stages = 3;
  config.norm_per_head = norm_per_head;
  config.beam_width = beam_width;
  config.tied = beam_width == 1;
  return config;
}

/// `count` tokens of ones, the channel of one of them replaced.
std::vector<float> ones_but(float strange, Index count = 3) {
  std::vector<float> floats(static_cast<std::size_t>(count * kChannels), 1.0f);
  floats[static_cast<std::size_t>(kChannels + 5)] = strange;
  return floats;
}

/// What a codec makes of keys: decoded keys `[tokens][kChannels]`.
std::vector<float> coded(const KeyCodec& codec, const std::vector<float>& keys) {
  const auto tokens = static_cast<Index>(keys.size()) / kChannels;
  const Index row = kHeads * codec.config().num_codes();
  std::vector<std::uint16_t> codes(static_cast<std::size_t>(tokens * row));
  std::vector<std::uint16_t> norms(static_cast<std::size_t>(tokens * codec.num_norms()));
  std::vector<float> decoded(keys.size());
  codec.encode(as_matrix(keys, tokens, kChannels), as_matrix(codes, tokens, row), norms.data());
  codec.decode({codes.data(), tokens, row}, norms.data(), as_matrix(decoded, tokens, kChannels));
  return decoded;
}

TEST(KeyCodecNumbers, NanAndInfinityAreRefusedByTokenAndChannel) {
  Rng rng(1);
  const auto codec = random_key_codec(rng, key_config(), kHeads);
  for (const float bad : {kNan, kInfinity, -kInfinity})
    EXPECT_THAT(error_of([&] { coded(*codec, ones_but(bad)); }), HasSubstr("token 1, channel 5"));
}

TEST(KeyCodecNumbers, ZeroAndDenormalKeysDecodeToAlmostNothing) {
  for (const bool norm_per_head : {false, true})
    for (const int beam_width : {1, 4}) {
      Rng rng(2);
      const auto codec = random_key_codec(rng, key_config(norm_per_head, beam_width), kHeads);
      const std::vector<float> zeros(static_cast<std::size_t>(2 * kChannels), 0.0f);
      EXPECT_THAT(coded(*codec, zeros), Each(0.0f));
      const std::vector<float> tiny(zeros.size(), kDenormal);
      for (const float x : coded(*codec, tiny)) EXPECT_LE(std::abs(x), 1e-37f);
    }
}

TEST(KeyCodecNumbers, HugeKeysDecodeFiniteUntilTheirNormOverflows) {
  Rng rng(3);
  const auto codec = random_key_codec(rng, key_config(), kHeads);
  const std::vector<float> huge(static_cast<std::size_t>(kChannels), 5e37f);  // norm 2e38
  EXPECT_THAT(coded(*codec, huge), Each(IsFinite()));
  const std::vector<float> over(static_cast<std::size_t>(kChannels), 1e38f);  // norm 4e38
  EXPECT_THAT(error_of([&] { coded(*codec, over); }),
              AllOf(HasSubstr("norm 4e+38"), HasSubstr("3.3895e38")));
  // The largest norm that rounds to a finite bf16, and the next that does not.
  std::vector<float> edge(static_cast<std::size_t>(kChannels), 0.0f);
  edge[0] = 0x1.FEFFFEp127f;
  EXPECT_THAT(coded(*codec, edge), Each(IsFinite()));
  edge[0] = 0x1.FFp127f;
  EXPECT_NE(error_of([&] { coded(*codec, edge); }), "(no error)");
}

TEST(KeyCodecNumbers, CodebooksWhoseSquaresOverflowAreRefused) {
  KeyCodebook<float> codebook(key_config());
  codebook.rows[7] = 1e30f;
  codebook.derive_tied_books();
  EXPECT_THAT(error_of([&] { KeyEncoder<float>{codebook}; }),
              AllOf(HasSubstr("group 0"), HasSubstr("limit is 1e+18")));
  codebook.rows[7] = 1e17f;
  codebook.derive_tied_books();
  EXPECT_NO_THROW(KeyEncoder<float>{codebook});
  codebook.pair_weights.assign(kHeadDim / 2, 100.0f);
  EXPECT_THAT(error_of([&] { KeyEncoder<float>{codebook}; }), HasSubstr("limit is 1e+18"));
  for (const float bad : {0.0f, -1.0f, kNan, kInfinity, 1e10f}) {
    KeyCodebook<float> weighted(key_config());
    weighted.pair_weights.assign(kHeadDim / 2, 1.0f);
    weighted.pair_weights[2] = bad;
    EXPECT_THAT(error_of([&] { KeyEncoder<float>{weighted}; }), HasSubstr("pair weight 2"));
  }
  for (const float bad : {kNan, kInfinity}) {
    KeyCodebook<float> infinite(key_config());
    infinite.rows[3] = bad;
    EXPECT_THAT(error_of([&] { KeyCodec(std::vector{infinite}); }), HasSubstr("must be finite"));
  }
}

// The encoder of one head takes what is divided by the norm already.
TEST(KeyCodecNumbers, EncoderRefusesKeysThatAreNotNormalized) {
  const KeyEncoder<float> encoder{KeyCodebook<float>(key_config())};
  std::vector<std::uint16_t> codes(static_cast<std::size_t>(key_config().num_codes()));
  for (const float bad : {kNan, -kInfinity, 2e9f}) {
    std::vector<float> key(static_cast<std::size_t>(kHeadDim), 0.5f);
    key[6] = bad;
    EXPECT_THAT(error_of([&] {
                  encoder.encode({key.data(), 1, kHeadDim}, 1,
                                 {codes.data(), 1, static_cast<Index>(codes.size())});
                }),
                AllOf(HasSubstr("planar channel 6"), HasSubstr("divided by their norm")));
  }
}

KeyLearnerOptions learner_options(bool tied, int rounds = 1) {
  KeyLearnerOptions options;
  options.codec = key_config();
  options.codec.tied = tied;
  options.max_steps = 6;
  options.refinement.rounds = rounds;
  return options;
}

KeyCodec learn(const std::vector<float>& keys, const KeyLearnerOptions& options) {
  return learn_key_codec(as_matrix(keys, static_cast<Index>(keys.size()) / kChannels, kChannels),
                         options);
}

double relative_error(const std::vector<float>& exact, const std::vector<float>& decoded) {
  double error = 0, total = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    error += std::pow(double{decoded[i]} - exact[i], 2);
    total += std::pow(double{exact[i]}, 2);
  }
  return error / total;
}

TEST(KeyLearnerNumbers, NoTokensNanAndInfinityAreRefused) {
  const KeyLearnerOptions options = learner_options(true);
  EXPECT_THAT(error_of([&] { learn({}, options); }), HasSubstr("no keys to learn from"));
  EXPECT_THAT(error_of([&] { learn(std::vector<float>(kChannels, 0.0f), options); }),
              HasSubstr("keys are zero"));
  for (const float bad : {kNan, kInfinity})
    EXPECT_THAT(error_of([&] { learn(ones_but(bad), options); }), HasSubstr("token 1, channel 5"));
}

// Every cluster but one is empty; each keeps its centroid, and nothing becomes NaN.
TEST(KeyLearnerNumbers, EqualKeysAreLearntExactly) {
  for (const bool tied : {true, false})
    for (const Index tokens : {1, 2, 50}) {
      Rng rng(4);
      const std::vector<float> key = normal_floats(rng, kChannels);
      std::vector<float> keys;
      for (Index t = 0; t < tokens; ++t) keys.insert(keys.end(), key.begin(), key.end());
      const KeyCodec codec = learn(keys, learner_options(tied));
      EXPECT_LT(relative_error(keys, coded(codec, keys)), 1e-3) << tied << " " << tokens;
    }
}

TEST(KeyLearnerNumbers, FewerTokensThanCentroidsAreLearntAlmostExactly) {
  Rng rng(5);
  const std::vector<float> keys = normal_floats(rng, 3 * kChannels);
  for (const bool tied : {true, false}) {
    const KeyCodec codec = learn(keys, learner_options(tied));
    EXPECT_LT(relative_error(keys, coded(codec, keys)), 0.05) << tied;
  }
}

// Norms that bf16 cannot hold would leave such keys out, unseen.
TEST(KeyLearnerNumbers, HugeKeysAreLearntUntilTheirNormOverflows) {
  Rng rng(6);
  std::vector<float> keys = normal_floats(rng, 40 * kChannels);
  const double of_small = relative_error(keys, coded(learn(keys, learner_options(true)), keys));
  for (float& x : keys) x *= 0x1p124f;
  const double of_huge = relative_error(keys, coded(learn(keys, learner_options(true)), keys));
  EXPECT_NEAR(of_huge, of_small, 1e-6);  // a power of two changes no mantissa
  for (std::size_t i = 0; i < kChannels; ++i) keys[5 * kChannels + i] = 3e38f;
  EXPECT_THAT(error_of([&] { learn(keys, learner_options(true)); }),
              AllOf(HasSubstr("key of token 5"), HasSubstr("bf16")));
}

TEST(KeyLearnerNumbers, DenormalKeysAreLearntAsZerosOrFinite) {
  const std::vector<float> tiny(static_cast<std::size_t>(20 * kChannels), 1e-41f);
  const KeyCodec codec = learn(tiny, learner_options(true));
  for (int head = 0; head < kHeads; ++head)
    EXPECT_THAT(codec.codebook(head).rows, Each(IsFinite()));
  EXPECT_THAT(coded(codec, tiny), Each(IsFinite()));
}

TEST(KeyLearnerNumbers, KeysOfOneHeadMustBeNormalized) {
  std::vector<float> keys(static_cast<std::size_t>(4 * kHeadDim), 0.1f);
  keys[9] = 1e20f;
  EXPECT_THAT(error_of([&] {
                learn_key_codebook(as_matrix(keys, Index{4}, kHeadDim), learner_options(true));
              }),
              AllOf(HasSubstr("token 1, channel 1"), HasSubstr("divided by their norm")));
}

// Past 38 decades 1 / T is infinite in float; infinity times a difference of zero would be NaN.
TEST(KeyLearnerNumbers, TemperaturesFarBelowFloatsRangeAreHardAssignments) {
  Rng rng(7);
  const std::vector<float> keys = normal_floats(rng, 40 * kChannels);
  KeyLearnerOptions options = learner_options(true, 0);
  options.first_temperature = 1e-60;
  options.last_temperature = 1e-70;
  std::vector<KeyLearnerReport> reports;
  learn_key_codec(as_matrix(keys, Index{40}, kChannels), options, &reports);
  for (const KeyLearnerReport& report : reports)
    for (const std::vector<double>& stage : report.stage_objectives)
      EXPECT_THAT(stage, Each(IsFinite()));
}

TEST(KeyLearnerNumbers, WeightsWhoseInverseOrSquareOverflowsAreRefused) {
  const std::vector<float> keys(static_cast<std::size_t>(4 * kChannels), 1.0f);
  for (const float bad : {0.0f, kDenormal, kNan, kInfinity, 1e30f}) {
    KeyLearnerOptions options = learner_options(true);
    options.pair_weights.assign(kChannels / 2, 1.0f);
    options.pair_weights[3] = bad;
    EXPECT_THAT(error_of([&] { learn(keys, options); }), HasSubstr("pair weight 3"));
  }
}

TEST(QueryStatisticsNumbers, NanIsRefusedAndHugeQueriesStayFinite) {
  QueryStatistics statistics(key_config().pairs, kHeads);
  for (const float bad : {kNan, kInfinity}) {
    const std::vector<float> queries = ones_but(bad);
    EXPECT_NE(error_of([&] { statistics.add(as_matrix(queries, Index{3}, kChannels)); }),
              "(no error)");
  }
  const std::vector<float> huge(static_cast<std::size_t>(kChannels), kLargest);
  statistics.add(as_matrix(huge, Index{1}, kChannels));
  EXPECT_THAT(statistics.pair_weights(), Each(1.0f));
}

/// Decoded values `[tokens][kChannels]`.
std::vector<float> coded(const ValueCodec& codec, const std::vector<float>& values) {
  const auto tokens = static_cast<Index>(values.size()) / kChannels;
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(tokens * codec.code_bytes()));
  std::vector<std::uint16_t> scales(static_cast<std::size_t>(tokens));
  std::vector<float> decoded(values.size());
  const auto code_rows = as_matrix(codes, tokens, codec.code_bytes());
  codec.encode(as_matrix(values, tokens, kChannels), code_rows, scales.data());
  codec.decode(code_rows, scales.data(), as_matrix(decoded, tokens, kChannels));
  return decoded;
}

TEST(ValueCodecNumbers, NanInfinityZeroDenormalAndHugeValues) {
  Rng rng(8);
  const auto codec = random_value_codec(rng, kChannels, 1, 8);
  for (const float bad : {kNan, kInfinity, -kInfinity})
    EXPECT_THAT(error_of([&] { coded(*codec, ones_but(bad)); }), HasSubstr("token 1, channel 5"));
  const std::vector<float> zeros(static_cast<std::size_t>(2 * kChannels), 0.0f);
  EXPECT_THAT(coded(*codec, zeros), Each(0.0f));
  const std::vector<float> tiny(zeros.size(), kDenormal);
  for (const float x : coded(*codec, tiny)) EXPECT_LE(std::abs(x), 1e-37f);
  const std::vector<float> huge(zeros.size(), 1e37f);
  EXPECT_THAT(coded(*codec, huge), Each(IsFinite()));
}

TEST(ValueCodecNumbers, ScalesBeyondBf16AreRefusedNamingTheToken) {
  Rng rng(9);
  const auto random = random_value_codec(rng, kChannels, 1, 8);
  ValueCodecWeights weights = random->weights();
  for (float& x : weights.decoder) x *= 1e-3f;
  const ValueCodec codec(random->config(), weights);
  EXPECT_THAT(coded(codec, ones_but(2.0f)), Each(IsFinite()));
  EXPECT_THAT(error_of([&] { coded(codec, ones_but(kLargest)); }),
              AllOf(HasSubstr("value of token 1"), HasSubstr("bf16")));
}

// Weights may be finite and still overflow inside the encoder; the code is then one of zeros.
TEST(ValueCodecNumbers, HugeWeightsGiveCodesAllTheSame) {
  Rng rng(10);
  for (const int sweeps : {0, 2}) {
    const auto random = random_value_codec(rng, kChannels, 2, 8);
    ValueCodecConfig config = random->config();
    config.polish_sweeps = sweeps;
    ValueCodecWeights weights = random->weights();
    for (float& x : weights.hidden_weight) x *= 1e38f / 8;
    for (float& x : weights.output_weight) x *= 1e37f;
    const ValueCodec codec(config, weights);
    EXPECT_THAT(coded(codec, ones_but(2.0f)), Each(IsFinite()));
  }
}

ValueTrainerOptions trainer_options() {
  ValueTrainerOptions options;
  options.codec = {static_cast<int>(kChannels), 1, 8};
  options.steps = 20;
  options.batch_tokens = 8;
  options.refinement.rounds = 2;
  return options;
}

ValueCodec train(const std::vector<float>& values) {
  return train_value_codec(
      as_matrix(values, static_cast<Index>(values.size()) / kChannels, kChannels),
      trainer_options());
}

TEST(ValueTrainerNumbers, NoTokensZerosNanAndInfinityAreRefused) {
  EXPECT_THAT(error_of([] { train({}); }), HasSubstr("nothing to learn"));
  EXPECT_THAT(error_of([] { train(std::vector<float>(kChannels, 0.0f)); }),
              HasSubstr("nothing to learn"));
  for (const float bad : {kNan, kInfinity})
    EXPECT_THAT(error_of([&] { train(ones_but(bad)); }), HasSubstr("token 1, channel 5"));
}

TEST(ValueTrainerNumbers, EqualDenormalAndHugeValuesGiveFiniteCodecs) {
  for (const float scale : {1.0f, kDenormal, 1e37f}) {
    const std::vector<float> values(static_cast<std::size_t>(5 * kChannels), scale);
    EXPECT_THAT(coded(train(values), values), Each(IsFinite())) << scale;
  }
}

CacheConfig cache_config(FloatType type = FloatType::kFp32) {
  CacheConfig config;
  config.rope.pairs = key_config().pairs;
  config.num_kv_heads = kHeads;
  config.window = 4;
  config.page_size = 8;
  config.exact_type = type;
  return config;
}

LayerCodec layer_codec() {
  Rng rng(11);
  return {random_key_codec(rng, key_config(), kHeads), random_value_codec(rng, kChannels, 1, 8)};
}

void append(LayerCache& cache, const std::vector<float>& keys, const std::vector<float>& values) {
  const auto tokens = static_cast<Index>(keys.size()) / kChannels;
  cache.append(as_matrix(keys, tokens, kChannels), as_matrix(values, tokens, kChannels));
}

std::vector<float> attended(const LayerCache& cache, const std::vector<float>& queries,
                            const AttentionOptions& options = {}, float* lse = nullptr) {
  const auto rows = static_cast<Index>(queries.size()) / kChannels;
  std::vector<float> output(queries.size());
  attend(cache, as_matrix(queries, rows, kChannels), options, as_matrix(output, rows, kChannels),
         lse);
  return output;
}

TEST(CacheNumbers, WhatAnExactTypeCannotHoldIsRefusedAndChangesNothing) {
  const std::vector<float> good = ones_but(2.0f);
  for (const auto& [type, most, over] : {std::tuple(FloatType::kFp16, 65519.0f, 65520.0f),
                                         std::tuple(FloatType::kBf16, 0x1.FEFFFEp127f, 0x1.FFp127f),
                                         std::tuple(FloatType::kFp32, kLargest, kInfinity)}) {
    LayerCache cache(cache_config(type), {});
    append(cache, ones_but(most), ones_but(-most));
    for (const float bad : {over, -over, kNan}) {
      EXPECT_THAT(error_of([&] { append(cache, ones_but(bad), good); }),
                  AllOf(HasSubstr("key of token 4, channel 5"), HasSubstr(name_of(type))));
      EXPECT_THAT(error_of([&] { append(cache, good, ones_but(bad)); }),
                  HasSubstr("value of token 4, channel 5"));
    }
    EXPECT_EQ(cache.length(), 3);
  }
}

// Refused later, when it leaves the window, such a key would make every later append fail.
TEST(CacheNumbers, AKeyWhoseNormCannotBeCodedIsRefusedAtOnce) {
  LayerCache cache(cache_config(), layer_codec());
  const std::vector<float> good(kChannels, 1.0f), huge(kChannels, 1e38f);
  EXPECT_THAT(error_of([&] { append(cache, huge, good); }),
              AllOf(HasSubstr("key of token 0"), HasSubstr("4e+38")));
  EXPECT_EQ(cache.length(), 0);
  const std::vector<float> large(kChannels, 0x1p124f);  // norm 8.5e37
  for (int t = 0; t < 60; ++t) append(cache, t % 2 == 0 ? large : good, good);
  EXPECT_EQ(cache.length(), 60);
  LayerCache exact(cache_config(), {nullptr, layer_codec().values});
  EXPECT_NO_THROW(append(exact, huge, good));  // nothing to code
}

TEST(CacheNumbers, AValueWhoseScaleCannotBeCodedIsRefusedAtOnce) {
  for (const int num_blocks : {1, 2}) {
    Rng rng(12);
    const auto random = random_value_codec(rng, kChannels, 1, 8, num_blocks);
    ValueCodecWeights weights = random->weights();
    for (float& x : weights.decoder) x *= 1e-3f;
    LayerCache cache(cache_config(),
                     {nullptr, std::make_shared<const ValueCodec>(random->config(), weights)});
    const std::vector<float> good(kChannels, 1.0f), huge(kChannels, 1e38f);
    append(cache, good, good);
    EXPECT_THAT(error_of([&] { append(cache, good, huge); }),
                AllOf(HasSubstr("value of token 1 has norm 4e+38"), HasSubstr("bf16")));
    for (int t = 0; t < 60; ++t) append(cache, good, std::vector<float>(kChannels, 1e31f));
    EXPECT_EQ(cache.length(), 61);
  }
}

TEST(CacheNumbers, SizesWhoseSumsOverflowAreRefused) {
  for (Index CacheConfig::*const field : {&CacheConfig::window, &CacheConfig::sinks})
    for (const Index bad : {std::numeric_limits<Index>::max(), (Index{1} << 48) + 1, Index{-1}}) {
      CacheConfig config = cache_config();
      config.*field = bad;
      EXPECT_THAT(error_of([&] { config.validate(); }), HasSubstr(std::to_string(bad)));
    }
  CacheConfig config = cache_config();
  config.window = config.sinks = Index{1} << 48;
  LayerCache cache(config, layer_codec());
  for (int t = 0; t < 3; ++t) append(cache, ones_but(2.0f), ones_but(2.0f));
  EXPECT_EQ(cache.length(), 9);
}

TEST(CacheNumbers, NoTokensAreNoChangeAndNoAttention) {
  LayerCache cache(cache_config(), layer_codec());
  append(cache, {}, {});
  EXPECT_EQ(cache.length(), 0);
  EXPECT_THAT(error_of([&] { attended(cache, std::vector<float>(kChannels, 1.0f)); }),
              HasSubstr("cache of 0 tokens"));
  append(cache, ones_but(1.0f), ones_but(1.0f));
  EXPECT_THAT(error_of([&] { attended(cache, {}); }), HasSubstr("at least one query"));
}

TEST(AttentionNumbers, ZeroAndDenormalKeysWeighAllTokensAlike) {
  for (const float key : {0.0f, kDenormal}) {
    LayerCache cache(cache_config(), layer_codec());
    const std::vector<float> keys(static_cast<std::size_t>(40 * kChannels), key);
    const std::vector<float> values(keys.size(), 3.0f);
    append(cache, keys, values);
    LayerCache exact(cache_config(), {});
    append(exact, keys, values);
    std::vector<float> lse(kHeads);
    EXPECT_THAT(attended(cache, std::vector<float>(kChannels, 1.0f), {}, lse.data()),
                Each(IsFinite()));
    EXPECT_THAT(lse, Each(testing::FloatNear(std::log(40.0f), 1e-5f)));
    EXPECT_THAT(attended(exact, std::vector<float>(kChannels, 1.0f)),
                Each(testing::FloatNear(3.0f, 1e-5f)));
  }
}

TEST(AttentionNumbers, QueriesMustBeFinite) {
  LayerCache cache(cache_config(), layer_codec());
  append(cache, ones_but(1.0f), ones_but(1.0f));
  for (const float bad : {kNan, kInfinity})
    EXPECT_THAT(error_of([&] { attended(cache, ones_but(bad)); }), HasSubstr("query 1, channel 5"));
}

// Scores of infinity would turn the sum of weights into NaN.
TEST(AttentionNumbers, ScoresThatOverflowAreAnError) {
  for (const bool is_coded : {false, true})
    for (const float sign : {1.0f, -1.0f}) {
      LayerCache cache(cache_config(), is_coded ? layer_codec() : LayerCodec{});
      const std::vector<float> keys(static_cast<std::size_t>(40 * kChannels), 1e37f);
      append(cache, keys, std::vector<float>(keys.size(), 1.0f));
      const std::vector<float> query(kChannels, sign * 1e37f);
      EXPECT_THAT(error_of([&] { attended(cache, query); }),
                  AllOf(HasSubstr("attention of query 0, head 0"), HasSubstr("scale queries")));
      // As large as can be: differences of scores decide, and the result is one of the values.
      const std::vector<float> small(kChannels, sign * 1e-37f);
      EXPECT_THAT(attended(cache, small), Each(IsFinite()));
    }
}

TEST(AttentionNumbers, ASoftCapMustBeFiniteAndTamesHugeScores) {
  LayerCache cache(cache_config(), {});
  const std::vector<float> keys(static_cast<std::size_t>(8 * kChannels), 1e30f);
  append(cache, keys, std::vector<float>(keys.size(), 2.0f));
  AttentionOptions options;
  options.soft_cap = 30.0f;
  EXPECT_THAT(attended(cache, std::vector<float>(kChannels, 1.0f), options),
              Each(testing::FloatNear(2.0f, 1e-5f)));
  options.soft_cap = kNan;
  EXPECT_THAT(error_of([&] { attended(cache, std::vector<float>(kChannels, 1.0f), options); }),
              HasSubstr("soft_cap is nan"));
}

TEST(AttentionNumbers, HugeValuesAverageToFiniteOnes) {
  LayerCache cache(cache_config(), {});
  const std::vector<float> keys(static_cast<std::size_t>(40 * kChannels), 1.0f);
  append(cache, keys, std::vector<float>(keys.size(), 1e37f));
  EXPECT_THAT(attended(cache, std::vector<float>(kChannels, 1.0f)),
              Each(testing::FloatNear(1e37f, 1e32f)));
}

TEST(Float16Numbers, OverflowIsInfinityAndUnderflowSignedZero) {
  EXPECT_EQ(from_fp16(to_fp16(65519.0f)), 65504.0f);
  EXPECT_EQ(from_fp16(to_fp16(65520.0f)), kInfinity);
  EXPECT_EQ(from_bf16(to_bf16(kLargest)), kInfinity);
  EXPECT_EQ(from_fp16(to_fp16(0x1p-25f)), 0.0f);
  EXPECT_TRUE(std::signbit(from_fp16(to_fp16(-kDenormal))));
  EXPECT_TRUE(std::isnan(from_bf16(to_bf16(kNan))) && std::isnan(from_fp16(to_fp16(kNan))));
}

}  // namespace
}  // namespace commvq
