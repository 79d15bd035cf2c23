#include "engine/learner.hpp"

namespace engine {

Learner host_learner() {
  return {[](auto keys, const auto& options) { return commvq::learn_key_codec(keys, options); },
          [](auto values, const auto& options) {
            return commvq::train_value_codec(values, options);
          }};
}

}  // namespace engine
