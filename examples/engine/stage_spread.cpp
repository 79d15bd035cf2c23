#include "engine/stage_spread.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <utility>

#include "commvq/core/error.hpp"

#include "engine/calibration_data.hpp"
#include "engine/evaluation.hpp"
#include "engine/parallel.hpp"

namespace engine {
namespace {

/// What is learnt briefly: enough to tell layers apart that differ by a hundred times.
constexpr int kBriefTokens = 4096, kBriefSteps = 2;
constexpr Index kExactWindow = 128;

/// Contexts to learn from briefly, and never the last one unless there is no other.
std::vector<std::vector<int>> brief_contexts(const std::vector<std::vector<int>>& contexts) {
  const std::size_t wanted = static_cast<std::size_t>(kBriefTokens) / contexts[0].size();
  const std::size_t count =
      std::clamp<std::size_t>(wanted, 1, std::max<std::size_t>(contexts.size() - 1, 1));
  return evenly(contexts, count);
}

}  // namespace

LayerDivergences measure_layers(const Model& model, const std::vector<commvq::LayerCodec>& codecs,
                                std::span<const int> window, Index exact_window, Index sinks,
                                const std::function<void(double)>& progress) {
  commvq::Cache exact = model.make_cache({});
  const std::vector<float> logits = model.prefill(window, exact, Logits::kAll);
  const std::size_t num_layers = codecs.size();
  LayerDivergences result{std::vector<double>(num_layers), std::vector<double>(num_layers)};
  std::vector<std::function<void()>> tasks;
  for (std::size_t layer = 0; layer < num_layers; ++layer) {
    const auto add = [&](const commvq::LayerCodec& side, double& divergence_of_side) {
      tasks.push_back([&, side, layer] {
        std::vector<commvq::LayerCodec> alone(num_layers);
        alone[layer] = side;
        commvq::Cache cache = model.make_cache(alone, exact_window, sinks);
        divergence_of_side = divergence(model, cache, window, exact_window, logits);
      });
    };
    if (codecs[layer].keys) add({codecs[layer].keys, nullptr}, result.keys[layer]);
    if (codecs[layer].values) add({nullptr, codecs[layer].values}, result.values[layer]);
  }
  std::mutex mutex;
  std::size_t num_done = 0;
  for_each_task(static_cast<Index>(tasks.size()), [&](Index task) {
    tasks[static_cast<std::size_t>(task)]();
    const std::lock_guard lock(mutex);
    if (progress) progress(double(++num_done) / double(tasks.size()));
  });
  return result;
}

int step_time(int stages) {
  // Of earlier kernels, to which every stage counted; those of now take four at a time.
  static constexpr int kTimes[kMostTimedStages] = {
      117, 125, 127, 134, 144, 157, 167, 174, 176, 182, 189,  //
      210, 220, 226, 236, 239, 256, 254, 270, 276, 285, 288,  //
      371, 379, 395, 396, 399, 412, 419, 424, 435, 439, 446,  //
      463, 481, 464, 495, 492, 517, 505, 533, 525, 546, 532};
  commvq::require(stages >= 1 && stages <= kMostTimedStages, "stages is ", stages,
                  "; times of 1 to ", kMostTimedStages, " are known");
  return kTimes[stages - 1];
}

std::vector<int> spread_stages(const std::vector<double>& divergences, int stages) {
  constexpr double kFactor = 0.87;
  constexpr int kLeastTime = 9;  // of a stage: no more stages than allowed come for their time
  const int fewest = (stages + 2) / 3, most = 2 * stages;
  commvq::require(stages >= 1 && most <= kMostTimedStages, "stages is ", stages,
                  "; stages are spread over layers where there are 1 to ", kMostTimedStages / 2);
  const auto cost = [&](int count) {
    return std::max(step_time(count), step_time(stages) + kLeastTime * (count - stages));
  };
  const std::size_t num_layers = divergences.size();
  const auto budget = num_layers * static_cast<std::size_t>(cost(stages));
  // By what the layers so far may cost: the least divergence, and the last one's stages for it.
  std::vector<double> least(budget + 1, 0.0);
  std::vector<std::vector<int>> choices(num_layers, std::vector<int>(budget + 1, fewest));
  for (std::size_t layer = 0; layer < num_layers; ++layer) {
    std::vector<double> with_layer(budget + 1, std::numeric_limits<double>::infinity());
    for (int count = fewest; count <= most; ++count) {
      const double divergence = divergences[layer] * std::pow(kFactor, count - stages);
      const auto taken = static_cast<std::size_t>(cost(count));
      for (std::size_t c = taken; c <= budget; ++c)
        if (least[c - taken] + divergence < with_layer[c]) {
          with_layer[c] = least[c - taken] + divergence;
          choices[layer][c] = count;
        }
    }
    least = std::move(with_layer);
  }
  std::vector<int> spread(num_layers);
  std::size_t left = budget;
  for (std::size_t layer = num_layers; layer-- > 0;) {
    spread[layer] = choices[layer][left];
    left -= static_cast<std::size_t>(cost(spread[layer]));
  }
  return spread;
}

std::vector<int> propose_stages(const Learner& learner, const Model& model,
                                const std::vector<std::vector<int>>& contexts,
                                const KeyOptionsOf& options_of,
                                const std::function<void(double)>& progress) {
  const ModelConfig& config = model.config();
  const CalibrationData data = collect(model, brief_contexts(contexts));
  std::vector<commvq::LayerCodec> codecs(data.layers.size());
  for (std::size_t layer = 0; layer < codecs.size(); ++layer) {
    const std::vector<float>& keys = data.layers[layer].keys;
    commvq::KeyLearnerOptions options = options_of(layer, data.layers[layer].queries);
    options.max_tokens = std::min(options.max_tokens, kBriefTokens);
    options.max_steps = std::min(options.max_steps, kBriefSteps);
    options.refinement.rounds = 0;
    const auto tokens = static_cast<Index>(keys.size()) / config.kv_size();
    codecs[layer].keys = std::make_shared<commvq::KeyCodec>(
        learner.learn_key_codec({keys.data(), tokens, config.kv_size()}, options));
    if (progress) progress(0.5 * double(layer + 1) / double(codecs.size()));
  }
  const std::vector<int>& window = contexts.back();
  const LayerDivergences divergences = measure_layers(
      model, codecs, window, std::min(kExactWindow, static_cast<Index>(window.size()) / 2),
      /*sinks=*/0, [&](double share) {
        if (progress) progress(0.5 + 0.5 * share);
      });
  return spread_stages(divergences.keys, codecs[0].keys->config().num_stages);
}

}  // namespace engine
