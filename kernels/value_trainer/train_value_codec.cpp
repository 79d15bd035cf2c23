#include <memory>

#include "commvq/cuda/learner.hpp"

#include "learner/value_learning.hpp"
#include "value_trainer/device_value_work.hpp"

namespace commvq::cuda {

ValueCodec train_value_codec(MatrixView<const float> values, const ValueTrainerOptions& options,
                             ValueTrainerReport* report) {
  return value_learning::train(
      values, options,
      [](MatrixView<const float> of_block, const ValueCodecConfig& config,
         const ValueCodecWeights& initial) {
        return std::make_unique<DeviceValueWork>(of_block, config, initial);
      },
      report);
}

}  // namespace commvq::cuda
