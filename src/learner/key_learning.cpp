#include "learner/key_learning.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "learner/graded_books.hpp"
#include "learner/key_refinement.hpp"
#include "learner/key_sample.hpp"
#include "learner/progress_meter.hpp"

namespace commvq::key_learning {
namespace {

using key_em::Matrix;

/// Tied books whose centres (A, A) are residuals chosen at random: rows x / (1 + j).
Matrix initial_books(KeyWork& keys, Index size, std::mt19937_64& random) {
  const Matrix chosen = keys.residuals(choose(keys.size(), size, random));
  const Index g = chosen.cols() / 2;
  Matrix books(2 * size, 2 * g);
  for (Index c = 0; c < size; ++c) {
    const auto x = chosen.row(c % chosen.rows());
    books.row(c).head(g) = 0.5f * (x.head(g) + x.tail(g));
    books.row(c).tail(g) = 0.5f * (x.tail(g) - x.head(g));
  }
  key_em::tie(books);
  return books;
}

/// Temperature of an EM step: exponential from first to last, a tenth after every so many stages.
double temperature_of(const KeyLearnerOptions& options, int stage, int step) {
  const double share =
      options.max_steps > 1 ? static_cast<double>(step) / (options.max_steps - 1) : 0;
  const double ratio = options.last_temperature / options.first_temperature;
  return options.first_temperature * std::pow(ratio, share) *
         std::pow(0.1, stage / options.stages_per_decade);
}

/// A refinement round costs about so many EM steps of every stage.
constexpr double kStepsPerRound = 10.0;

/// Work of one head's learning in EM steps.
double total_steps(const KeyLearnerOptions& options) {
  const int of_stages = options.codec.graded ? 0 : options.max_steps;
  return double(options.codec.num_groups()) * options.codec.num_stages *
         (of_stages + kStepsPerRound * options.refinement.rounds);
}

/// Learns one stage of one group from its residuals and returns the best books met.
Matrix learn_stage(KeyWork& keys, const KeyLearnerOptions& options, int stage,
                   std::mt19937_64& random, ProgressMeter& progress,
                   std::vector<double>& objectives) {
  Matrix books = initial_books(keys, options.codec.codebook_size, random);
  Matrix best = books;
  double best_objective = std::numeric_limits<double>::infinity();
  for (int step = 0; step <= options.max_steps; ++step) {
    const double temperature =
        temperature_of(options, stage, std::min(step, options.max_steps - 1));
    const key_em::Statistics statistics = keys.soft_assign(books, temperature);
    const double objective = statistics.squared_error / static_cast<double>(keys.size());
    objectives.push_back(objective);
    if (objective < best_objective) {
      best_objective = objective;
      best = books;
    }
    if (step == options.max_steps) break;
    books = key_em::solve_books(statistics, books, options.codec.tied);
    progress.advance(
        "keys: stage " + std::to_string(stage + 1) + "/" + std::to_string(options.codec.num_stages),
        1, best_objective);
  }
  return best;
}

/// Learns one group stage by stage.
void learn_stages(KeyWork& keys, const KeyLearnerOptions& options, int group,
                  std::mt19937_64& random, ProgressMeter& progress, KeyCodebook<float>& codebook,
                  std::vector<std::vector<double>>& objectives) {
  for (int stage = 0; stage < options.codec.num_stages; ++stage) {
    keys.begin_stage(codebook, group, stage);
    objectives.emplace_back();
    const Matrix books = learn_stage(keys, options, stage, random, progress, objectives.back());
    keys.assign(books);
    std::copy_n(books.data(), books.size(), codebook.book(group, stage, 0));
  }
}

std::vector<double> refine(KeyWork& keys, const KeyLearnerOptions& options,
                           KeyCodebook<float>& codebook, ProgressMeter& progress) {
  codebook.config.beam_width = options.refinement.beam_width;
  const double steps = kStepsPerRound * options.codec.num_groups() * options.codec.num_stages;
  return refine_key_codebook(keys, options.refinement, codebook, [&](int round, double objective) {
    progress.advance("keys: refinement " + std::to_string(round + 1) + "/" +
                         std::to_string(options.refinement.rounds),
                     steps, objective);
  });
}

void check_keys(MatrixView<const float> keys, Index cols) {
  require(keys.rows > 0, "there are no keys to learn from");
  require(keys.cols == cols, "the keys have ", keys.cols, " channels; expected ", cols);
  for (Index t = 0; t < keys.rows; ++t)
    for (Index i = 0; i < keys.cols; ++i)
      require(std::isfinite(keys(t, i)), "key of token ", t, ", channel ", i, " is ", keys(t, i),
              "; only finite keys can be learnt from");
}

/// Those of single heads come divided by their norm; their squares must not overflow.
void check_normalized(MatrixView<const float> keys) {
  constexpr float kMaxKey = 1e9f;
  for (Index t = 0; t < keys.rows; ++t)
    for (Index i = 0; i < keys.cols; ++i)
      require(std::abs(keys(t, i)) <= kMaxKey, "key of token ", t, ", channel ", i, " is ",
              keys(t, i), "; keys must be divided by their norm first");
}

void check_weights(const std::vector<float>& weights, Index needed) {
  constexpr float kLeast = 1e-9f, kMost = 1e9f;  // no square and no inverse of these overflows
  require(weights.empty() || static_cast<Index>(weights.size()) == needed, "there are ",
          weights.size(), " pair weights; expected ", needed, " or none");
  for (std::size_t i = 0; i < weights.size(); ++i)
    require(weights[i] >= kLeast && weights[i] <= kMost, "pair weight ", i, " is ", weights[i],
            "; it must be in [", kLeast, ", ", kMost, "]");
}

/// Divides the rows of a codebook learnt from weighted keys by the weights, which it then carries.
void fold_weights(const std::vector<float>& weights, KeyCodebook<float>& codebook) {
  if (weights.empty()) return;
  std::vector<float> inverse = weights;
  for (float& factor : inverse) factor = 1.0f / factor;
  codebook.rows = codebook.scaled_rows(inverse);
  codebook.pair_weights = weights;
}

}  // namespace

KeyCodebook<float> learn(KeyWork& keys, const KeyLearnerOptions& options, std::mt19937_64& random,
                         KeyLearnerReport* report) {
  ProgressMeter progress(options.progress, total_steps(options));
  KeyLearnerReport result;
  KeyCodebook<float> codebook(options.codec);
  for (int group = 0; group < options.codec.num_groups(); ++group)
    if (options.codec.graded)
      graded_books::initialize(keys, group, codebook);
    else
      learn_stages(keys, options, group, random, progress, codebook, result.stage_objectives);
  if (options.refinement.rounds > 0)
    result.refinement_objectives = refine(keys, options, codebook, progress);
  fold_weights(options.pair_weights, codebook);
  if (options.codec.graded) codebook.derive_graded_rows();
  if (report != nullptr) *report = std::move(result);
  return codebook;
}

void check_head(MatrixView<const float> keys, const KeyLearnerOptions& options) {
  options.validate();
  check_keys(keys, options.codec.pairs.head_dim);
  check_normalized(keys);
  check_weights(options.pair_weights, options.codec.pairs.num_pairs());
}

int check_layer(MatrixView<const float> keys, const KeyLearnerOptions& options) {
  options.validate();
  const int head_dim = options.codec.pairs.head_dim;
  require(keys.cols > 0 && keys.cols % head_dim == 0, "the keys have ", keys.cols,
          " channels; expected a multiple of head_dim = ", head_dim);
  check_keys(keys, keys.cols);
  const auto num_heads = static_cast<int>(keys.cols / head_dim);
  check_weights(options.pair_weights, Index{num_heads} * options.codec.pairs.num_pairs());
  bool all_zero = true;
  for (Index t = 0; t < keys.rows; ++t)
    all_zero &= std::all_of(keys.row(t), keys.row(t) + keys.cols, [](float x) { return x == 0; });
  require(!all_zero, "all ", keys.rows, " keys are zero; there is nothing to learn");
  return num_heads;
}

KeyLearnerOptions options_of_head(const KeyLearnerOptions& options, int head,
                                  ProgressCallback progress) {
  const int num_pairs = options.codec.pairs.num_pairs();
  KeyLearnerOptions result = options;
  result.seed = options.seed + static_cast<std::uint64_t>(head);
  if (const auto weights = options.pair_weights.begin(); !options.pair_weights.empty())
    result.pair_weights.assign(weights + head * num_pairs, weights + (head + 1) * num_pairs);
  result.progress = std::move(progress);
  return result;
}

}  // namespace commvq::key_learning
