#include "commvq/learner/value_trainer.hpp"

#include <cmath>
#include <memory>

#include "learner/host_value_work.hpp"
#include "learner/value_learning.hpp"

namespace commvq {

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
  return value_learning::train(
      values, options,
      [](MatrixView<const float> of_block, const ValueCodecConfig& config,
         const ValueCodecWeights& initial) {
        return std::make_unique<HostValueWork>(of_block, config, initial);
      },
      report);
}

}  // namespace commvq
