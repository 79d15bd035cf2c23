#include "commvq/cuda/learner.hpp"

#include "engine/learner.hpp"

namespace engine {

Learner device_learner() {
  return {[](auto keys, const auto& options) { return commvq::cuda::learn_key_codec(keys, options); },
          [](auto values, const auto& options) {
            return commvq::cuda::train_value_codec(values, options);
          }};
}

}  // namespace engine
