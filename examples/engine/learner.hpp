#pragma once

#include <functional>
#include <string>

#include "commvq/learner/key_learner.hpp"
#include "commvq/learner/value_trainer.hpp"

namespace engine {

/// Where codecs are learnt.
struct Learner {
  std::function<commvq::KeyCodec(commvq::MatrixView<const float>, const commvq::KeyLearnerOptions&)>
      learn_key_codec;
  std::function<commvq::ValueCodec(commvq::MatrixView<const float>,
                                   const commvq::ValueTrainerOptions&)>
      train_value_codec;
};

Learner host_learner();

/// On the current CUDA device. Throws `commvq::Error` where the engine was built without CUDA.
Learner device_learner();

}  // namespace engine
