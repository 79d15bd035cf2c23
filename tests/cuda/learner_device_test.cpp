// The learners on the device, compared with the host's on the same keys and values.
#include <cmath>
#include <limits>

#include "commvq/cuda/learner.hpp"

#include <gmock/gmock.h>

#include "device.hpp"
#include "key_learner/device_key_work.hpp"
#include "learner/host_key_work.hpp"
#include "learner/host_value_work.hpp"
#include "reference/key_shape.hpp"
#include "reference/random_cache.hpp"
#include "value_trainer/device_value_work.hpp"

namespace commvq::cuda {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;
using testing_support::KeyShape;
using testing_support::normal_floats;
using testing_support::Rng;

KeyLearnerOptions options_of(const KeyShape& shape) {
  KeyLearnerOptions options;
  options.codec = shape.config();
  options.max_steps = 5;
  options.refinement.rounds = 2;
  options.refinement.beam_width = 4;
  return options;
}

/// Keys of `clusters` kinds, as a codebook can learn.
std::vector<float> clustered(Rng& rng, Index tokens, Index channels, double deviation) {
  constexpr Index kClusters = 40;
  const std::vector<float> centres = normal_floats(rng, kClusters * channels, deviation);
  std::vector<float> result = normal_floats(rng, tokens * channels, 0.3 * deviation);
  for (Index t = 0; t < tokens; ++t) {
    const Index cluster = static_cast<Index>(rng() % kClusters);
    for (Index c = 0; c < channels; ++c)
      result[static_cast<std::size_t>(t * channels + c)] +=
          centres[static_cast<std::size_t>(cluster * channels + c)];
  }
  return result;
}

class KeyWorkOnDevice : public testing::TestWithParam<KeyShape> {
 protected:
  void SetUp() override { COMMVQ_NEEDS_DEVICE(); }
};

TEST_P(KeyWorkOnDevice, GivesTheHostsStatisticsAndErrors) {
  const KeyLearnerOptions options = options_of(GetParam());
  const KeyCodecConfig& config = options.codec;
  const Index tokens = 1500, width = 2 * config.group_pairs;
  Rng rng(7);
  const std::vector<float> keys = clustered(rng, tokens, config.pairs.head_dim, 0.1);
  const KeySample sample(as_matrix(keys, tokens, config.pairs.head_dim), options, rng);
  HostKeyWork host(sample, config, 512);
  DeviceKeyWork device(sample, config);
  ASSERT_EQ(device.size(), tokens);

  KeyCodebook<float> codebook(config);
  double size = 0.1;
  for (int stage = 0; stage < config.num_stages; ++stage, size *= 0.6)
    for (int group = 0; group < config.num_groups(); ++group) {
      host.begin_stage(codebook, group, stage);
      device.begin_stage(codebook, group, stage);
      const std::vector<Index> some = {0, 1, 77, tokens - 1};
      EXPECT_LT((host.residuals(some) - device.residuals(some)).cwiseAbs().maxCoeff(), 1e-5f);

      key_em::Matrix books(2 * config.codebook_size, width);
      const std::vector<float> rows = normal_floats(rng, books.size(), size);
      std::copy(rows.begin(), rows.end(), books.data());
      if (config.tied) key_em::tie(books);
      for (const double temperature : {0.5, 1e-2, 1e-12, 1e-45}) {
        const key_em::Statistics expected = host.soft_assign(books, temperature);
        const key_em::Statistics result = device.soft_assign(books, temperature);
        EXPECT_NEAR(result.squared_error, expected.squared_error, 1e-4 * expected.squared_error);
        EXPECT_NEAR(result.pair_weights.sum(), static_cast<double>(tokens), 1e-3 * double(tokens));
        ASSERT_TRUE(result.sums.allFinite()) << temperature;
        if (temperature < 1e-3) continue;  // one assignment that differs is a whole key
        EXPECT_LT((result.pair_weights - expected.pair_weights).cwiseAbs().maxCoeff(),
                  1e-4 * static_cast<double>(tokens));
        EXPECT_LT((result.sums - expected.sums).cwiseAbs().maxCoeff(),
                  1e-4 * static_cast<double>(tokens));
      }
      host.assign(books);
      device.assign(books);
      std::copy_n(books.data(), books.size(), codebook.book(group, stage, 0));
    }
  EXPECT_NEAR(device.error(codebook), host.error(codebook), 1e-4 * host.error(codebook));

  for (const int beam : {1, 4, 16}) {
    const double expected = host.encode(codebook, beam, false);
    EXPECT_NEAR(device.encode(codebook, beam, false), expected, 1e-4 * expected) << "beam " << beam;
  }
  for (int group = 0; group < config.num_groups(); ++group) {
    const Occurrences expected = host.occurrences(group), result = device.occurrences(group);
    // Codes differ where two candidates are as good as equal.
    EXPECT_LT((result.counts - expected.counts).cwiseAbs().sum(), 0.01 * expected.counts.sum());
    EXPECT_EQ(result.counts.sum(), expected.counts.sum());
    EXPECT_LT((result.sums - expected.sums).norm(), 0.05 * expected.sums.norm());
  }
  const double greedy = host.encode(codebook, 1, false);
  EXPECT_NEAR(device.encode(codebook, 1, false), greedy, 1e-4 * greedy);
  const double kept = device.encode(codebook, 4, true);
  EXPECT_LE(kept, greedy);
  EXPECT_NEAR(kept, host.encode(codebook, 4, true), 1e-4 * greedy);
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, KeyWorkOnDevice,
    testing::Values(KeyShape{128, 64, 64, 4, false}, KeyShape{128, 64, 64, 3, true},
                    KeyShape{64, 8, 10, 2, true}, KeyShape{128, 32, 100, 2, false},
                    KeyShape{128, 64, 256, 2, false}, KeyShape{128, 64, 2, 60, false}));

class LearnersOnDevice : public testing::Test {
 protected:
  void SetUp() override { COMMVQ_NEEDS_DEVICE(); }
};

class KeyLearnersOnDevice : public testing::TestWithParam<KeyShape> {
 protected:
  void SetUp() override { COMMVQ_NEEDS_DEVICE(); }
};

TEST_P(KeyLearnersOnDevice, LearnAsWellAsTheHostAndTheSameEachTime) {
  KeyLearnerOptions options = options_of(GetParam());
  options.codec.norm_per_head = true;
  options.pair_weights.assign(3 * 32, 1.0f);
  options.pair_weights[5] = 2.0f;
  Rng rng(3);
  const Index tokens = 3000, channels = 3 * 64;
  const std::vector<float> keys = clustered(rng, tokens, channels, 1.0);
  std::vector<KeyLearnerReport> expected, result;
  commvq::learn_key_codec(as_matrix(keys, tokens, channels), options, &expected);
  const KeyCodec codec = cuda::learn_key_codec(as_matrix(keys, tokens, channels), options, &result);
  ASSERT_EQ(result.size(), 3u);
  for (std::size_t head = 0; head < 3; ++head) {
    const std::vector<double>& objectives = result[head].refinement_objectives;
    ASSERT_EQ(objectives.size(), expected[head].refinement_objectives.size());
    for (std::size_t i = 1; i < objectives.size(); ++i) EXPECT_LE(objectives[i], objectives[i - 1]);
    EXPECT_NEAR(objectives.back(), expected[head].refinement_objectives.back(),
                0.05 * objectives.back());
  }
  const KeyCodec again = cuda::learn_key_codec(as_matrix(keys, tokens, channels), options);
  for (int head = 0; head < 3; ++head)
    EXPECT_EQ(again.codebook(head).rows, codec.codebook(head).rows) << "head " << head;
}

INSTANTIATE_TEST_SUITE_P(Shapes, KeyLearnersOnDevice,
                         testing::Values(KeyShape{64, 32, 16, 3, false},
                                         KeyShape{64, 32, 2, 60, false},
                                         KeyShape{64, 32, 2, 28, false, true}));

TEST_F(LearnersOnDevice, TrainAndCodeValuesAsTheHost) {
  for (const auto& [bits, graded] : {std::pair(1, false), {2, false}, {1, true}, {2, true}}) {
    ValueCodecConfig config{96, bits, 160, 8};
    config.graded = graded;
    Rng rng(5);
    const Index tokens = 2000;
    std::vector<float> values = clustered(rng, tokens, config.num_channels, 2.0);
    std::fill_n(values.begin(), config.num_channels, 0.0f);  // one value is zero
    const std::shared_ptr<const ValueCodec> initial = testing_support::random_value_codec(
        rng, config.num_channels, bits, config.hidden_size, 1, graded);
    const auto view = as_matrix(values, tokens, config.num_channels);
    HostValueWork host(view, config, initial->weights());
    DeviceValueWork device(view, config, initial->weights());
    std::vector<Index> rows(128);
    for (std::uint32_t step = 0; step < 30; ++step) {
      for (Index& row : rows) row = 1 + static_cast<Index>(rng() % (tokens - 1));
      const double loss = host.train(rows, step, 1.0, 1e-3);
      EXPECT_NEAR(device.train(rows, step, 1.0, 1e-3), loss, 0.005 * loss) << "step " << step;
    }
    const ValueCodecWeights weights = host.weights();
    std::vector<Index> all(static_cast<std::size_t>(tokens - 1));
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<Index>(i) + 1;
    const CodedValues expected = host.encode(weights, all), result = device.encode(weights, all);
    EXPECT_NEAR(result.relative_error, expected.relative_error, 1e-3 * expected.relative_error);
    EXPECT_LT((result.normal - expected.normal).norm(), 0.01 * expected.normal.norm());
    EXPECT_LT((result.right - expected.right).norm(), 0.01 * expected.right.norm());
  }
}

TEST_F(LearnersOnDevice, TrainValueCodecsAsGoodAsTheHosts) {
  ValueTrainerOptions options = ValueTrainerOptions::commvq(ValueCodecConfig::commvq_1bit(64));
  options.steps = 200;
  options.refinement.rounds = 2;
  Rng rng(9);
  const Index tokens = 4000;
  const std::vector<float> values = clustered(rng, tokens, 64, 1.0);
  for (const bool graded : {false, true}) {
    options.codec.graded = graded;
    ValueTrainerReport expected, result;
    commvq::train_value_codec(as_matrix(values, tokens, 64), options, &expected);
    const ValueCodec codec =
        cuda::train_value_codec(as_matrix(values, tokens, 64), options, &result);
    EXPECT_NEAR(result.refinement_objectives.back(), expected.refinement_objectives.back(),
                0.1 * expected.refinement_objectives.back());
    const ValueCodec again = cuda::train_value_codec(as_matrix(values, tokens, 64), options);
    EXPECT_EQ(again.weights().decoder, codec.weights().decoder);
    EXPECT_EQ(again.weights().hidden_weight, codec.weights().hidden_weight);
  }
}

TEST_F(LearnersOnDevice, RefuseWhatTheKernelsDoNotTake) {
  Rng rng(1);
  const std::vector<float> keys = normal_floats(rng, 100 * 64);
  KeyLearnerOptions options = options_of({64, 32, 1024, 2, false});
  const auto learn = [&] { cuda::learn_key_codec(as_matrix(keys, 100, 64), options); };
  EXPECT_THAT(learn, ThrowsMessage<Error>(HasSubstr("codebook_size is 1024")));
  options = options_of({64, 32, 8, 2, false});
  options.refinement.beam_width = 17;
  EXPECT_THAT(learn, ThrowsMessage<Error>(HasSubstr("beam_width is 17")));
}

TEST_F(LearnersOnDevice, PassOnWhatTheCallbackThrows) {
  Rng rng(1);
  const std::vector<float> keys = normal_floats(rng, 500 * 128);
  KeyLearnerOptions options = options_of({64, 32, 8, 2, false});
  int calls = 0;
  double last = 0;
  options.progress = [&](const Progress& step) {
    EXPECT_GE(step.fraction, last);
    last = step.fraction;
    if (++calls == 5) throw Error("enough");
  };
  EXPECT_THAT([&] { cuda::learn_key_codec(as_matrix(keys, 500, 128), options); },
              ThrowsMessage<Error>(HasSubstr("enough")));
}

}  // namespace
}  // namespace commvq::cuda
