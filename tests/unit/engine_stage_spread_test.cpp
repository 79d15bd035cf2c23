#include <cmath>
#include <numeric>
#include <random>

#include <gtest/gtest.h>

#include "engine/calibration_data.hpp"
#include "engine/stage_spread.hpp"
#include "reference/example_data.hpp"

namespace engine {
namespace {

using commvq::testing_support::small_model;

std::vector<std::vector<int>> contexts(int count, int tokens) {
  std::vector<std::vector<int>> result(static_cast<std::size_t>(count));
  for (int i = 0; i < count * tokens; ++i)
    result[static_cast<std::size_t>(i / tokens)].push_back(1 + i * 37 % 500);
  return result;
}

commvq::KeyLearnerOptions brief_options(const Model& model) {
  auto options = commvq::KeyLearnerOptions::commvq(
      commvq::KeyCodecConfig::commvq_1bit(model.config().rope.pairs));
  options.codec.codebook_size = 4;
  options.codec.num_stages = 2;
  options.max_steps = 1;
  return options;
}

int total_time(const std::vector<int>& spread) {
  return std::accumulate(spread.begin(), spread.end(), 0,
                         [](int sum, int stages) { return sum + step_time(stages); });
}

TEST(SpreadStages, GivesTheWorstLayerMore) {
  EXPECT_EQ(spread_stages({1, 1, 1}, 11), (std::vector<int>{11, 11, 11}));
  const std::vector<int> spread = spread_stages({1, 1, 4, 1}, 11);
  EXPECT_GT(spread[2], 11);
  EXPECT_LT(spread[0], 11);
  // A third, and what the time of twice ten leaves: 2 * 182 - 134 is between those of 14 and 15.
  EXPECT_EQ(spread_stages({0, 1e9}, 10), (std::vector<int>{4, 14}));
}

TEST(SpreadStages, TakesNoMoreStagesNorTimeThanWithoutSpreading) {
  std::mt19937_64 rng(1);
  std::lognormal_distribution<double> divergence(0.0, 2.0);
  for (const int stages : {1, 2, 11, 20, 22})
    for (const std::size_t num_layers : {1u, 8u, 32u}) {
      std::vector<double> divergences(num_layers);
      for (double& of_layer : divergences) of_layer = divergence(rng);
      const std::vector<int> spread = spread_stages(divergences, stages);
      const std::vector<int> even(num_layers, stages);
      EXPECT_LE(std::accumulate(spread.begin(), spread.end(), 0),
                std::accumulate(even.begin(), even.end(), 0));
      EXPECT_LE(total_time(spread), total_time(even));
      double sum = 0, even_sum = 0;
      for (std::size_t i = 0; i < num_layers; ++i) {
        EXPECT_GE(3 * spread[i], stages);
        EXPECT_LE(spread[i], 2 * stages);
        sum += divergences[i] * std::pow(0.87, spread[i] - stages);
        even_sum += divergences[i];
      }
      EXPECT_LE(sum, even_sum);
      if (num_layers > 1 && stages > 2) {
        EXPECT_LT(sum, 0.8 * even_sum) << stages << " stages";
      }
    }
}

TEST(SpreadStages, RefusesWhatIsNotTimed) {
  EXPECT_THROW(spread_stages({1, 1}, 23), commvq::Error);
}

TEST(MeasureLayers, CountsEachCodedSideAndNoOther) {
  const Model model(small_model());
  const std::vector<int> window = contexts(1, 80)[0];
  const CalibrationData data = collect(model, {window});
  const Index channels = model.config().kv_size();
  std::vector<commvq::LayerCodec> codecs(data.layers.size());
  codecs[1].keys = std::make_shared<commvq::KeyCodec>(
      commvq::learn_key_codec({data.layers[1].keys.data(), 80, channels}, brief_options(model)));
  commvq::ValueTrainerOptions values;
  values.codec = commvq::ValueCodecConfig::commvq_1bit(static_cast<int>(channels));
  values.codec.hidden_size = 16;
  values.steps = 2;
  codecs[2].values = std::make_shared<commvq::ValueCodec>(
      commvq::train_value_codec({data.layers[2].values.data(), 80, channels}, values));
  double done = 0;
  const LayerDivergences found =
      measure_layers(model, codecs, window, 8, 0, [&](double share) { done = share; });
  EXPECT_EQ(done, 1);
  for (std::size_t layer = 0; layer < codecs.size(); ++layer) {
    EXPECT_EQ(found.keys[layer] > 0, layer == 1) << layer;
    EXPECT_EQ(found.values[layer] > 0, layer == 2) << layer;
  }
}

TEST(ProposeStages, GivesEveryLayerStagesAndNoMoreInAll) {
  const Model model(small_model());
  const auto options_of = [&](std::size_t, const commvq::QueryStatistics& queries) {
    auto options = brief_options(model);
    options.codec.num_stages = 4;
    options.pair_weights = queries.pair_weights();
    return options;
  };
  const std::vector<int> stages =
      propose_stages(host_learner(), model, contexts(3, 64), options_of);
  ASSERT_EQ(static_cast<int>(stages.size()), model.config().num_layers);
  EXPECT_LE(std::accumulate(stages.begin(), stages.end(), 0), 4 * model.config().num_layers);
  for (const int of_layer : stages) {
    EXPECT_GE(of_layer, 2);
    EXPECT_LE(of_layer, 8);
  }
  EXPECT_EQ(propose_stages(host_learner(), model, contexts(3, 64), options_of), stages);
}

}  // namespace
}  // namespace engine
