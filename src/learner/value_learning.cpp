#include "learner/value_learning.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <random>
#include <utility>

#include "learner/progress_meter.hpp"
#include "learner/value_refinement.hpp"
#include "value_codec/value_layers.hpp"

namespace commvq::value_learning {
namespace {

/// Weights of linear layers uniform in +-1 / sqrt(inputs), LayerNorm the identity.
ValueCodecWeights initial_weights(const ValueCodecConfig& config, std::mt19937_64& random) {
  const Index C = config.num_channels, H = config.hidden_size, L = config.num_logits();
  const auto uniform = [&](Index rows, Index cols, Index inputs) {
    const float bound = 1 / std::sqrt(static_cast<float>(inputs));
    std::vector<float> weights(static_cast<std::size_t>(rows * cols));
    for (float& weight : weights)
      weight = bound * (static_cast<float>(random() >> 40) * 0x1p-23f - 1.0f);
    return weights;
  };
  const auto constant = [](Index size, float value) {
    return std::vector<float>(static_cast<std::size_t>(size), value);
  };
  ValueCodecWeights weights;
  weights.norm_gain = constant(C, 1.0f);
  weights.norm_bias = constant(C, 0.0f);
  weights.hidden_weight = uniform(H, C, C);
  weights.hidden_bias = constant(H, 0.0f);
  weights.output_weight = uniform(L, H, H);
  weights.output_bias = constant(L, 0.0f);
  weights.decoder = uniform(config.num_code_bits(), C, config.num_code_bits());
  return weights;
}

/// Linear warm-up over the first 5% of the steps, then half a cosine to zero.
double rate_at(const ValueTrainerOptions& options, int step) {
  const double warm_up = std::max(1.0, 0.05 * options.steps);
  if (step < warm_up) return options.learning_rate * (step + 1) / warm_up;
  const double share = (step - warm_up) / std::max(1.0, options.steps - warm_up);
  return options.learning_rate * 0.5 * (1 + std::cos(std::numbers::pi * share));
}

/// Rows of the values that are not zero.
std::vector<Index> usable_rows(MatrixView<const float> values) {
  std::vector<Index> rows;
  for (Index t = 0; t < values.rows; ++t) {
    for (Index c = 0; c < values.cols; ++c)
      require(std::isfinite(values(t, c)), "value of token ", t, ", channel ", c, " is ",
              values(t, c), "; only finite values can be learnt from");
    if (value_layers::norm_of(values.row(t), values.cols) > 0) rows.push_back(t);
  }
  require(!rows.empty(), "all ", values.rows, " values are zero or there are none; there is ",
          "nothing to learn");
  return rows;
}

/// At most `count` of the given rows, evenly spread.
std::vector<Index> spread_over(const std::vector<Index>& rows, Index count) {
  const auto size = static_cast<Index>(rows.size());
  std::vector<Index> chosen(static_cast<std::size_t>(std::min(count, size)));
  for (Index i = 0; i < static_cast<Index>(chosen.size()); ++i)
    chosen[static_cast<std::size_t>(i)] =
        rows[static_cast<std::size_t>(i * size / static_cast<Index>(chosen.size()))];
  return chosen;
}

/// A refinement round costs about so many Adam steps.
constexpr double kStepsPerRound = 20.0;

}  // namespace

ValueCodec train(MatrixView<const float> values, const ValueTrainerOptions& options,
                 const MakeWork& make_work, ValueTrainerReport* report) {
  options.validate();
  require(values.cols == options.codec.num_channels, "the values have ", values.cols,
          " channels; the codec has ", options.codec.num_channels);
  const std::vector<Index> rows = usable_rows(values);

  std::mt19937_64 random(options.seed);
  const std::unique_ptr<ValueWork> work = make_work(initial_weights(options.codec, random));
  ValueTrainerReport result;
  ProgressMeter progress(options.progress,
                         options.steps + kStepsPerRound * options.refinement.rounds);
  std::vector<Index> batch(static_cast<std::size_t>(options.batch_tokens));
  for (int step = 0; step < options.steps; ++step) {
    for (Index& row : batch) row = rows[random() % rows.size()];
    const double loss = work->train(batch, static_cast<std::uint32_t>(random()),
                                    options.temperature, rate_at(options, step));
    require(std::isfinite(loss), "training diverged at step ", step, " of ", options.steps,
            " (loss ", loss, "); use a smaller learning_rate than ", options.learning_rate);
    result.objectives.push_back(loss);
    progress.advance("values", 1, loss);
  }
  ValueCodecWeights weights = work->weights();
  if (options.refinement.rounds > 0)
    result.refinement_objectives = refine_value_decoder(
        *work, spread_over(rows, options.refinement.max_tokens), options.refinement, weights,
        [&](int, double error) { progress.advance("values: refinement", kStepsPerRound, error); });
  if (report != nullptr) *report = std::move(result);
  return ValueCodec(options.codec, std::move(weights));
}

}  // namespace commvq::value_learning
