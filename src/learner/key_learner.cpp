#include "commvq/learner/key_learner.hpp"

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>

#include "learner/key_em.hpp"
#include "learner/key_refinement.hpp"
#include "learner/key_sample.hpp"
#include "learner/progress_meter.hpp"

namespace commvq {
namespace {

using key_em::Matrix;
using key_em::Residuals;

/// Tied books whose centres (A, A) are residuals chosen at random: rows x / (1 + j).
Matrix initial_books(const Residuals& residuals, Index size, std::mt19937_64& random) {
  const std::vector<Index> chosen = choose(residuals.size, size, random);
  const Index g = residuals.width / 2;
  Matrix books(2 * size, 2 * g);
  Matrix x(1, 2 * g);
  for (Index c = 0; c < size; ++c) {
    residuals.read(chosen[static_cast<std::size_t>(c) % chosen.size()], x);
    books.row(c).head(g) = 0.5f * (x.row(0).head(g) + x.row(0).tail(g));
    books.row(c).tail(g) = 0.5f * (x.row(0).tail(g) - x.row(0).head(g));
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
Matrix learn_stage(const Residuals& residuals, const KeyLearnerOptions& options, int stage,
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
    const double objective = statistics.squared_error / static_cast<double>(residuals.size);
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

/// What the first `stage` stages of a group leave of the keys whose codes `codes` holds. Made anew
/// from the keys and codes at each reading: they take much less memory than residuals would.
Residuals residuals_of(const KeySample& keys, const KeyCodebook<float>& codebook,
                       const std::vector<std::uint16_t>& codes, int group, int stage) {
  const KeyCodecConfig& config = codebook.config;
  const int g = config.group_pairs;
  return {keys.size(), Index{2} * g, [=, &keys, &codebook, &codes](Index first, Matrix& rows) {
            keys.read(first, rows.rows(), group * g, g, rows.data());
            for (Index t = 0; t < rows.rows(); ++t) {
              const std::uint16_t* code =
                  &codes[static_cast<std::size_t>((first + t) * config.num_codes())] +
                  Index{2} * group * config.num_stages;
              for (int s = 0; s < stage; ++s, code += 2) {
                using Row = Eigen::Map<const Eigen::RowVectorXf>;
                rows.row(t) -= Row(codebook.book(group, s, 0) + code[0] * 2 * g, 2 * g) +
                               Row(codebook.book(group, s, 1) + code[1] * 2 * g, 2 * g);
              }
            }
          }};
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

/// Learns the codebook of one head stage by stage, group by group, and refines it.
KeyCodebook<float> learn(const KeySample& sample, const KeyLearnerOptions& options,
                         std::mt19937_64& random, KeyLearnerReport* report) {
  ProgressMeter progress(options.progress, total_steps(options));
  KeyLearnerReport result;
  KeyCodebook<float> codebook(options.codec);
  const Index num_codes = options.codec.num_codes();
  std::vector<std::uint16_t> codes(static_cast<std::size_t>(sample.size() * num_codes));
  for (int group = 0; group < options.codec.num_groups(); ++group)
    for (int stage = 0; stage < options.codec.num_stages; ++stage) {
      const Residuals residuals = residuals_of(sample, codebook, codes, group, stage);
      result.stage_objectives.emplace_back();
      const Matrix books =
          learn_stage(residuals, options, stage, random, progress, result.stage_objectives.back());
      std::copy_n(books.data(), books.size(), codebook.book(group, stage, 0));
      key_em::find_nearest(residuals, books,
                           codes.data() + 2 * (group * options.codec.num_stages + stage),
                           num_codes);
    }
  if (options.refinement.rounds > 0) {
    codebook.config.beam_width = options.refinement.beam_width;
    const double steps = kStepsPerRound * options.codec.num_groups() * options.codec.num_stages;
    const auto done = [&](int round, double objective) {
      progress.advance("keys: refinement " + std::to_string(round + 1) + "/" +
                           std::to_string(options.refinement.rounds),
                       steps, objective);
    };
    result.refinement_objectives = refine_key_codebook(sample, options.refinement,
                                                       options.batch_tokens, codebook, codes, done);
  }
  fold_weights(options.pair_weights, codebook);
  if (report != nullptr) *report = std::move(result);
  return codebook;
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
  check_normalized(keys);
  check_weights(options.pair_weights, options.codec.pairs.num_pairs());
  std::mt19937_64 random(options.seed);
  return learn(KeySample(keys, options, random), options, random, report);
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
    std::mt19937_64 random(of_head.seed);
    const KeySample sample(keys, head, of_head, random);
    codebooks.push_back(
        learn(sample, of_head, random,
              reports != nullptr ? &(*reports)[static_cast<std::size_t>(head)] : nullptr));
  }
  return KeyCodec(std::move(codebooks));
}

}  // namespace commvq
