#include "commvq/learner/key_learner.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <utility>

#include "commvq/core/float16.hpp"

#include "learner/key_em.hpp"
#include "learner/key_refinement.hpp"
#include "learner/progress_meter.hpp"

namespace commvq {
namespace {

using key_em::Matrix;

/// `count` different indices below `size` in random order; all of them if `count` is larger.
std::vector<Index> choose(Index size, Index count, std::mt19937_64& random) {
  std::vector<Index> indices(static_cast<std::size_t>(size));
  std::iota(indices.begin(), indices.end(), Index{0});
  count = std::min(count, size);
  for (Index i = 0; i < count; ++i) {
    const auto other = i + static_cast<Index>(random() % static_cast<std::uint64_t>(size - i));
    std::swap(indices[static_cast<std::size_t>(i)], indices[static_cast<std::size_t>(other)]);
  }
  indices.resize(static_cast<std::size_t>(count));
  return indices;
}

/// Tied books whose centres (A, A) are residuals chosen at random: rows x / (1 + j).
Matrix initial_books(const Matrix& residuals, Index size, std::mt19937_64& random) {
  const std::vector<Index> chosen = choose(residuals.rows(), size, random);
  const Index g = residuals.cols() / 2;
  Matrix books(2 * size, 2 * g);
  for (Index c = 0; c < size; ++c) {
    const auto x = residuals.row(chosen[static_cast<std::size_t>(c) % chosen.size()]);
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
  return double(options.codec.num_groups()) * options.codec.num_stages *
         (options.max_steps + kStepsPerRound * options.refinement.rounds);
}

/// Learns one stage of one group from its residuals and returns the best books met.
Matrix learn_stage(const Matrix& residuals, const KeyLearnerOptions& options, int stage,
                   std::mt19937_64& random, ProgressMeter& progress,
                   std::vector<double>& objectives) {
  Matrix books = initial_books(residuals, options.codec.codebook_size, random);
  Matrix best = books;
  double best_objective = std::numeric_limits<double>::infinity();
  for (int step = 0; step <= options.max_steps; ++step) {
    const double temperature =
        temperature_of(options, stage, std::min(step, options.max_steps - 1));
    const key_em::Statistics statistics =
        key_em::soft_assign(residuals, books, temperature, options.batch_tokens);
    const double objective = statistics.squared_error / static_cast<double>(residuals.rows());
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

Matrix group_of(MatrixView<const float> keys, const KeyCodecConfig& config, int group) {
  const int g = config.group_pairs;
  Matrix residuals(keys.rows, 2 * g);
  for (Index t = 0; t < keys.rows; ++t)
    for (int part = 0; part < 2; ++part)
      std::copy_n(keys.row(t) + part * config.pairs.num_pairs() + group * g, g,
                  residuals.row(t).data() + part * g);
  return residuals;
}

void check_keys(MatrixView<const float> keys, Index cols) {
  require(keys.rows > 0, "there are no keys to learn from");
  require(keys.cols == cols, "the keys have ", keys.cols, " channels; expected ", cols);
  for (Index t = 0; t < keys.rows; ++t)
    for (Index i = 0; i < keys.cols; ++i)
      require(std::isfinite(keys(t, i)), "key of token ", t, ", channel ", i, " is ", keys(t, i),
              "; only finite keys can be learnt from");
}

void check_weights(const std::vector<float>& weights, Index needed) {
  require(weights.empty() || static_cast<Index>(weights.size()) == needed, "there are ",
          weights.size(), " pair weights; expected ", needed, " or none");
  for (std::size_t i = 0; i < weights.size(); ++i)
    require(weights[i] > 0 && std::isfinite(weights[i]), "pair weight ", i, " is ", weights[i],
            "; it must be positive and finite");
}

/// A random choice of at most `max_tokens` keys, with the weights applied.
Matrix sample_of(MatrixView<const float> keys, const KeyLearnerOptions& options,
                 std::mt19937_64& random) {
  Matrix sample(std::min<Index>(keys.rows, options.max_tokens), keys.cols);
  const std::vector<Index> chosen = choose(keys.rows, sample.rows(), random);
  for (Index t = 0; t < sample.rows(); ++t)
    std::copy_n(keys.row(chosen[static_cast<std::size_t>(t)]), keys.cols, sample.row(t).data());
  if (options.pair_weights.empty()) return sample;
  const Eigen::Map<const Eigen::RowVectorXf> weights(options.pair_weights.data(), keys.cols / 2);
  for (Index t = 0; t < sample.rows(); ++t) {
    sample.row(t).head(weights.size()).array() *= weights.array();
    sample.row(t).tail(weights.size()).array() *= weights.array();
  }
  return sample;
}

/// Divides the rows of a codebook learnt from weighted keys by the weights, which it then carries.
void fold_weights(const std::vector<float>& weights, KeyCodebook<float>& codebook) {
  if (weights.empty()) return;
  std::vector<float> inverse = weights;
  for (float& factor : inverse) factor = 1.0f / factor;
  codebook.rows = codebook.scaled_rows(inverse);
  codebook.pair_weights = weights;
}

/// Keys of one head whose norm is not zero, `[tokens][head_dim]`: planar and divided by the norm
/// that `KeyCodec` would store.
Matrix unit_keys(MatrixView<const float> keys, const KeyCodecConfig& config, int head) {
  const int head_dim = config.pairs.head_dim;
  const Index first = config.norm_per_head ? Index{head} * head_dim : 0;
  const Index count = config.norm_per_head ? head_dim : keys.cols;
  Matrix planar(keys.rows, head_dim);
  Index used = 0;
  std::vector<float> unit(static_cast<std::size_t>(head_dim));
  for (Index t = 0; t < keys.rows; ++t) {
    double sum = 0;
    for (Index i = first; i < first + count; ++i)
      sum += static_cast<double>(keys(t, i)) * keys(t, i);
    const double norm = from_bf16(to_bf16(static_cast<float>(std::sqrt(sum))));
    if (!(norm > 0) || !std::isfinite(norm)) continue;
    for (int c = 0; c < head_dim; ++c)
      unit[static_cast<std::size_t>(c)] =
          static_cast<float>(keys(t, Index{head} * head_dim + c) / norm);
    config.pairs.to_planar(unit.data(), planar.row(used++).data());
  }
  if (used == 0) planar.row(used++).setZero();  // a head that is always zero learns zeros
  planar.conservativeResize(used, Eigen::NoChange);
  return planar;
}

}  // namespace

void KeyLearnerOptions::validate() const {
  codec.validate();
  require(max_steps >= 1 && max_steps <= 100000, "max_steps is ", max_steps,
          "; it must be in [1, 100000]");
  require(std::isfinite(first_temperature) && last_temperature > 0 &&
              first_temperature >= last_temperature,
          "temperatures run from ", first_temperature, " to ", last_temperature,
          "; they must be positive and not rise");
  require(stages_per_decade >= 1, "stages_per_decade is ", stages_per_decade,
          "; it must be at least 1");
  require(max_tokens >= 1, "max_tokens is ", max_tokens, "; it must be at least 1");
  require(batch_tokens >= 1, "batch_tokens is ", batch_tokens, "; it must be at least 1");
  require(refinement.rounds >= 0 && refinement.rounds <= 10000, "refinement.rounds is ",
          refinement.rounds, "; it must be in [0, 10000]");
  require(refinement.beam_width >= 1 && refinement.beam_width <= 1024, "refinement.beam_width is ",
          refinement.beam_width, "; it must be in [1, 1024]");
  require(std::isfinite(refinement.ridge) && refinement.ridge > 0, "refinement.ridge is ",
          refinement.ridge, "; it must be positive");
}

KeyLearnerOptions KeyLearnerOptions::paper(const KeyCodecConfig& codec) {
  KeyLearnerOptions options;
  options.codec = codec;
  return options;
}

KeyLearnerOptions KeyLearnerOptions::commvq(const KeyCodecConfig& codec) {
  KeyLearnerOptions options;
  options.codec = codec;
  options.max_steps = 8;
  options.first_temperature = 1e-2;
  options.refinement.rounds = 2;
  return options;
}

KeyCodebook<float> learn_key_codebook(MatrixView<const float> keys,
                                      const KeyLearnerOptions& options, KeyLearnerReport* report) {
  options.validate();
  check_keys(keys, options.codec.pairs.head_dim);
  check_weights(options.pair_weights, options.codec.pairs.num_pairs());
  std::mt19937_64 random(options.seed);
  const Matrix sample = sample_of(keys, options, random);
  const MatrixView<const float> sampled(sample.data(), sample.rows(), sample.cols());

  ProgressMeter progress(options.progress, total_steps(options));
  KeyLearnerReport result;
  KeyCodebook<float> codebook(options.codec);
  for (int group = 0; group < options.codec.num_groups(); ++group) {
    Matrix residuals = group_of(sampled, options.codec, group);
    for (int stage = 0; stage < options.codec.num_stages; ++stage) {
      result.stage_objectives.emplace_back();
      const Matrix books =
          learn_stage(residuals, options, stage, random, progress, result.stage_objectives.back());
      std::copy_n(books.data(), books.size(), codebook.book(group, stage, 0));
      key_em::subtract_nearest(residuals, books);
    }
  }
  if (options.refinement.rounds > 0) {
    codebook.config.beam_width = options.refinement.beam_width;
    const double steps = kStepsPerRound * options.codec.num_groups() * options.codec.num_stages;
    result.refinement_objectives = refine_key_codebook(
        sampled, options.refinement, codebook, [&](int round, double objective) {
          progress.advance("keys: refinement " + std::to_string(round + 1) + "/" +
                               std::to_string(options.refinement.rounds),
                           steps, objective);
        });
  }
  fold_weights(options.pair_weights, codebook);
  if (report != nullptr) *report = std::move(result);
  return codebook;
}

KeyCodec learn_key_codec(MatrixView<const float> keys, const KeyLearnerOptions& options,
                         std::vector<KeyLearnerReport>* reports) {
  options.validate();
  const int head_dim = options.codec.pairs.head_dim;
  require(keys.cols > 0 && keys.cols % head_dim == 0, "the keys have ", keys.cols,
          " channels; expected a multiple of head_dim = ", head_dim);
  check_keys(keys, keys.cols);
  const auto num_heads = static_cast<int>(keys.cols / head_dim);
  const int num_pairs = options.codec.pairs.num_pairs();
  check_weights(options.pair_weights, Index{num_heads} * num_pairs);
  bool all_zero = true;
  for (Index t = 0; t < keys.rows; ++t)
    all_zero &= std::all_of(keys.row(t), keys.row(t) + keys.cols, [](float x) { return x == 0; });
  require(!all_zero, "all ", keys.rows, " keys are zero; there is nothing to learn");

  std::vector<KeyCodebook<float>> codebooks;
  if (reports != nullptr) reports->assign(static_cast<std::size_t>(num_heads), {});
  for (int head = 0; head < num_heads; ++head) {
    const Matrix units = unit_keys(keys, options.codec, head);
    KeyLearnerOptions of_head = options;
    of_head.seed = options.seed + static_cast<std::uint64_t>(head);
    if (const auto weights = options.pair_weights.begin(); !options.pair_weights.empty())
      of_head.pair_weights.assign(weights + head * num_pairs, weights + (head + 1) * num_pairs);
    if (options.progress)
      of_head.progress = [&](Progress progress) {
        progress.phase += ", head " + std::to_string(head + 1) + "/" + std::to_string(num_heads);
        progress.fraction = (head + progress.fraction) / num_heads;
        options.progress(progress);
      };
    codebooks.push_back(learn_key_codebook({units.data(), units.rows(), head_dim}, of_head,
                                           reports != nullptr ? &(*reports)[head] : nullptr));
  }
  return KeyCodec(std::move(codebooks));
}

}  // namespace commvq
