#include <numeric>

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

TEST(SpreadStages, GivesTheWorstLayerMoreAtTheSameTotal) {
  EXPECT_EQ(spread_stages({1, 1, 1}, 11), (std::vector<int>{11, 11, 11}));
  const std::vector<int> spread = spread_stages({1, 1, 4, 1}, 11);
  EXPECT_EQ(std::accumulate(spread.begin(), spread.end(), 0), 44);
  EXPECT_GT(spread[2], spread[0] + 8);  // log(4) / -log(0.87) = 9.95
  EXPECT_LT(spread[2], spread[0] + 12);
  EXPECT_EQ(spread_stages({0, 1e9}, 10), (std::vector<int>{5, 15}));
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

TEST(ProposeStages, GivesEveryLayerStagesAndKeepsTheirNumber) {
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
  EXPECT_EQ(std::accumulate(stages.begin(), stages.end(), 0), 4 * model.config().num_layers);
  for (const int of_layer : stages) {
    EXPECT_GE(of_layer, 2);
    EXPECT_LE(of_layer, 8);
  }
  EXPECT_EQ(propose_stages(host_learner(), model, contexts(3, 64), options_of), stages);
}

}  // namespace
}  // namespace engine
