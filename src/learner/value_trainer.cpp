#include "commvq/learner/value_trainer.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <random>
#include <utility>

#include "learner/progress_meter.hpp"
#include "learner/value_network.hpp"
#include "learner/value_refinement.hpp"

namespace commvq {
namespace {

using Network = ValueNetwork<float>;
using Matrix = Network::Matrix;

/// Uniform in (0, 1) from a counter: the same number for the same place, whatever the threads.
inline float uniform_at(std::uint32_t key, std::uint32_t counter) {
  std::uint32_t x = counter * 0x9e3779b9u + key;
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  x ^= x >> 16;
  return (static_cast<float>(x >> 9) + 0.5f) * 0x1p-23f;
}

/// Gumbel noise: -log(-log(uniform)).
void fill_gumbel(std::mt19937_64& random, Matrix& noise) {
  const auto key = static_cast<std::uint32_t>(random());
#pragma omp parallel for
  for (Index t = 0; t < noise.rows(); ++t) {
    auto row = noise.row(t);
    float* const values = row.data();
    const auto first = static_cast<std::uint32_t>(t * noise.cols());
#pragma omp simd
    for (Index i = 0; i < noise.cols(); ++i)
      values[i] = uniform_at(key, first + static_cast<std::uint32_t>(i));
    row = -(-row.array().log()).log();
  }
}

/// Weights of linear layers uniform in +-1 / sqrt(inputs), LayerNorm the identity.
void initialize(std::mt19937_64& random, Network& network) {
  network.value(network.norm_gain).setOnes();
  for (const Network::Parameter* weight :
       {&network.hidden_weight, &network.output_weight, &network.decoder}) {
    const bool is_decoder = weight == &network.decoder;
    const float bound = 1 / std::sqrt(static_cast<float>(is_decoder ? weight->rows : weight->cols));
    auto values = network.value(*weight);
    for (Index i = 0; i < values.size(); ++i)
      values.data()[i] = bound * (static_cast<float>(random() >> 40) * 0x1p-23f - 1.0f);
  }
}

/// Adam without weight decay (Kingma and Ba 2015, algorithm 1).
class Adam {
 public:
  explicit Adam(std::size_t size) : first_(size, 0.0f), second_(size, 0.0f) {}

  void step(const std::vector<float>& gradients, double rate, std::vector<float>& parameters) {
    constexpr double kBeta1 = 0.9, kBeta2 = 0.999;
    constexpr auto b1 = static_cast<float>(kBeta1), b2 = static_cast<float>(kBeta2);
    ++steps_;
    const double correction =
        std::sqrt(1 - std::pow(kBeta2, steps_)) / (1 - std::pow(kBeta1, steps_));
    const auto scaled_rate = static_cast<float>(rate * correction);
    const auto size = static_cast<Index>(parameters.size());
#pragma omp parallel for simd
    for (Index j = 0; j < size; ++j) {
      const auto i = static_cast<std::size_t>(j);
      first_[i] = b1 * first_[i] + (1 - b1) * gradients[i];
      second_[i] = b2 * second_[i] + (1 - b2) * gradients[i] * gradients[i];
      parameters[i] -= scaled_rate * first_[i] / (std::sqrt(second_[i]) + 1e-8f);
    }
  }

 private:
  std::vector<float> first_, second_;
  int steps_ = 0;
};

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

void draw_batch(MatrixView<const float> values, const std::vector<Index>& rows,
                std::mt19937_64& random, Matrix& units) {
  for (Index i = 0; i < units.rows(); ++i) {
    const float* const value = values.row(rows[random() % rows.size()]);
    const double norm = value_layers::norm_of(value, values.cols);
    for (Index c = 0; c < values.cols; ++c) units(i, c) = static_cast<float>(value[c] / norm);
  }
}

/// At most `count` of the given rows, evenly spread.
Matrix spread_over(MatrixView<const float> values, const std::vector<Index>& rows, Index count) {
  const auto size = static_cast<Index>(rows.size());
  Matrix chosen(std::min(count, size), values.cols);
  for (Index i = 0; i < chosen.rows(); ++i)
    std::copy_n(values.row(rows[static_cast<std::size_t>(i * size / chosen.rows())]), values.cols,
                chosen.row(i).data());
  return chosen;
}

/// A refinement round costs about so many Adam steps.
constexpr double kStepsPerRound = 20.0;

ValueCodecWeights weights_of(const Network& network) {
  const auto copy = [&](const Network::Parameter& parameter) {
    const auto first = network.parameters.begin() + parameter.offset;
    return std::vector<float>(first, first + parameter.size());
  };
  return {copy(network.norm_gain),   copy(network.norm_bias),     copy(network.hidden_weight),
          copy(network.hidden_bias), copy(network.output_weight), copy(network.output_bias),
          copy(network.decoder)};
}

}  // namespace

void ValueTrainerOptions::validate() const {
  codec.validate();
  require(steps >= 1 && steps <= 10000000, "steps is ", steps, "; it must be in [1, 10000000]");
  require(batch_tokens >= 1 && batch_tokens <= 1048576, "batch_tokens is ", batch_tokens,
          "; it must be in [1, 1048576]");
  require(std::isfinite(learning_rate) && learning_rate > 0, "learning_rate is ", learning_rate,
          "; it must be positive");
  require(std::isfinite(temperature) && temperature > 0, "temperature is ", temperature,
          "; it must be positive");
  require(refinement.rounds >= 0 && refinement.rounds <= 10000, "refinement.rounds is ",
          refinement.rounds, "; it must be in [0, 10000]");
  require(refinement.max_tokens >= 1, "refinement.max_tokens is ", refinement.max_tokens,
          "; it must be at least 1");
  require(std::isfinite(refinement.ridge) && refinement.ridge > 0, "refinement.ridge is ",
          refinement.ridge, "; it must be positive");
}

ValueTrainerOptions ValueTrainerOptions::paper(const ValueCodecConfig& codec) {
  ValueTrainerOptions options;
  options.codec = codec;
  return options;
}

ValueTrainerOptions ValueTrainerOptions::commvq(const ValueCodecConfig& codec) {
  ValueTrainerOptions options;
  options.codec = codec;
  options.steps = 500;
  options.refinement.rounds = 5;
  return options;
}

ValueCodec train_value_codec(MatrixView<const float> values, const ValueTrainerOptions& options,
                             ValueTrainerReport* report) {
  options.validate();
  require(values.cols == options.codec.num_channels, "the values have ", values.cols,
          " channels; the codec has ", options.codec.num_channels);
  const std::vector<Index> rows = usable_rows(values);

  std::mt19937_64 random(options.seed);
  Network network(options.codec);
  initialize(random, network);
  Adam adam(network.parameters.size());
  Matrix units(options.batch_tokens, values.cols);
  Matrix noise(options.batch_tokens, options.codec.num_logits());
  ValueTrainerReport result;
  ProgressMeter progress(options.progress,
                         options.steps + kStepsPerRound * options.refinement.rounds);
  for (int step = 0; step < options.steps; ++step) {
    draw_batch(values, rows, random, units);
    fill_gumbel(random, noise);
    const double loss = network.forward(units, noise, static_cast<float>(options.temperature),
                                        Network::Choice::kHard);
    require(std::isfinite(loss), "training diverged at step ", step, " of ", options.steps,
            " (loss ", loss, "); use a smaller learning_rate than ", options.learning_rate);
    network.backward();
    adam.step(network.gradients, rate_at(options, step), network.parameters);
    result.objectives.push_back(loss);
    progress.advance("values", 1, loss);
  }
  ValueCodecWeights weights = weights_of(network);
  if (options.refinement.rounds > 0) {
    const Matrix chosen = spread_over(values, rows, options.refinement.max_tokens);
    result.refinement_objectives = refine_value_decoder(
        {chosen.data(), chosen.rows(), chosen.cols()}, options.refinement, options.codec, weights,
        [&](int, double error) { progress.advance("values: refinement", kStepsPerRound, error); });
  }
  if (report != nullptr) *report = std::move(result);
  return ValueCodec(options.codec, std::move(weights));
}

}  // namespace commvq
