#include "learner/value_learning.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <random>
#include <utility>

#include "learner/graded_decoder.hpp"
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

void require_finite(MatrixView<const float> values) {
  for (Index t = 0; t < values.rows; ++t)
    for (Index c = 0; c < values.cols; ++c)
      require(std::isfinite(values(t, c)), "value of token ", t, ", channel ", c, " is ",
              values(t, c), "; only finite values can be learnt from");
}

/// Rows of a block's values, whose first channel is `first_channel`, that are not zero.
std::vector<Index> usable_rows(MatrixView<const float> values, Index first_channel) {
  std::vector<Index> rows;
  for (Index t = 0; t < values.rows; ++t)
    if (value_layers::norm_of(values.row(t), values.cols) > 0) rows.push_back(t);
  require(!rows.empty(), "all ", values.rows, " values are zero or there are none in channels [",
          first_channel, ", ", first_channel + values.cols, "); there is nothing to learn");
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

/// Weights of block `block`.
ValueCodecWeights train_block(Index block, MatrixView<const float> all_values,
                              const ValueTrainerOptions& options, const MakeWork& make_work,
                              ProgressMeter& progress, ValueTrainerReport& report) {
  const ValueCodecConfig config = options.codec.block();
  const Index first_channel = block * config.num_channels;
  const MatrixView<const float> values = all_values.middle_cols(first_channel, config.num_channels);
  const std::vector<Index> rows = usable_rows(values, first_channel);
  std::mt19937_64 random(options.seed);
  ValueCodecWeights initial = initial_weights(config, random);
  if (config.graded) initial.decoder = graded_decoder::initial(values, rows, config);
  const std::unique_ptr<ValueWork> work = make_work(values, config, initial);
  std::vector<Index> batch(static_cast<std::size_t>(options.batch_tokens));
  for (int step = 0; step < options.steps; ++step) {
    for (Index& row : batch) row = rows[random() % rows.size()];
    const double loss = work->train(batch, static_cast<std::uint32_t>(random()),
                                    options.temperature, rate_at(options, step));
    require(std::isfinite(loss), "training diverged at step ", step, " of ", options.steps,
            " (loss ", loss, "); use a smaller learning_rate than ", options.learning_rate);
    report.objectives.push_back(loss);
    progress.advance("values", 1, loss);
  }
  ValueCodecWeights weights = work->weights();
  if (options.refinement.rounds > 0) {
    const std::vector<double> errors = refine_value_decoder(
        *work, spread_over(rows, options.refinement.max_tokens), options.refinement, config.graded,
        weights,
        [&](int, double error) { progress.advance("values: refinement", kStepsPerRound, error); });
    report.refinement_objectives.insert(report.refinement_objectives.end(), errors.begin(),
                                        errors.end());
  }
  return weights;
}

}  // namespace

ValueCodec train(MatrixView<const float> values, const ValueTrainerOptions& options,
                 const MakeWork& make_work, ValueTrainerReport* report) {
  options.validate();
  const ValueCodecConfig& codec = options.codec;
  require(values.cols == codec.num_channels, "the values have ", values.cols,
          " channels; the codec has ", codec.num_channels);
  require_finite(values);
  ValueTrainerReport result;
  ProgressMeter progress(
      options.progress,
      codec.num_blocks * (options.steps + kStepsPerRound * options.refinement.rounds));
  ValueCodecWeights weights;
  for (Index block = 0; block < codec.num_blocks; ++block) {
    const ValueCodecWeights trained =
        train_block(block, values, options, make_work, progress, result);
    ValueCodecWeights::for_each([&](auto weight) {
      const std::vector<float>& part = trained.*weight;
      (weights.*weight).insert((weights.*weight).end(), part.begin(), part.end());
    });
  }
  if (report != nullptr) *report = std::move(result);
  return ValueCodec(codec, std::move(weights));
}

}  // namespace commvq::value_learning
