#include "commvq/learner/key_learner.hpp"

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <utility>

#include "learner/host_key_work.hpp"
#include "learner/key_learning.hpp"
#include "learner/key_sample.hpp"

namespace commvq {
namespace {

KeyCodebook<float> learn(const KeySample& sample, const KeyLearnerOptions& options,
                         std::mt19937_64& random, KeyLearnerReport* report) {
  HostKeyWork work(sample, options.codec, options.batch_tokens);
  return key_learning::learn(work, options, random, report);
}

/// Progress of one head as a share of all, which are learnt one after the other.
ProgressCallback progress_of_head(const ProgressCallback& progress, int head, int num_heads) {
  if (!progress) return {};
  return [=](Progress step) {
    step.phase += ", head " + std::to_string(head + 1) + "/" + std::to_string(num_heads);
    step.fraction = (head + step.fraction) / num_heads;
    progress(step);
  };
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
  // What is left falls with the bits that were spent: a decade for four stages of the paper's two
  // codes of 6 bits.
  options.stages_per_decade = std::max(1, 4 * 6 / codec.code_bits());
  // Graded codes have no stage-wise learning before it. More rounds find codes that the encoder's
  // search does not.
  options.refinement.rounds = codec.graded ? 4 : 2;
  return options;
}

KeyCodebook<float> learn_key_codebook(MatrixView<const float> keys,
                                      const KeyLearnerOptions& options, KeyLearnerReport* report) {
  key_learning::check_head(keys, options);
  std::mt19937_64 random(options.seed);
  return learn(KeySample(keys, options, random), options, random, report);
}

KeyCodec learn_key_codec(MatrixView<const float> keys, const KeyLearnerOptions& options,
                         std::vector<KeyLearnerReport>* reports) {
  const int num_heads = key_learning::check_layer(keys, options);
  std::vector<KeyCodebook<float>> codebooks;
  if (reports != nullptr) reports->assign(static_cast<std::size_t>(num_heads), {});
  for (int head = 0; head < num_heads; ++head) {
    const KeyLearnerOptions of_head = key_learning::options_of_head(
        options, head, progress_of_head(options.progress, head, num_heads));
    std::mt19937_64 random(of_head.seed);
    const KeySample sample(keys, head, of_head, random);
    codebooks.push_back(
        learn(sample, of_head, random,
              reports != nullptr ? &(*reports)[static_cast<std::size_t>(head)] : nullptr));
  }
  return KeyCodec(std::move(codebooks));
}

}  // namespace commvq
