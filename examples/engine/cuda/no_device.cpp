// In place of device_cache.cpp and device_learner.cpp where CUDA is not built.
#include "commvq/core/error.hpp"

#include "engine/device_cache.hpp"
#include "engine/learner.hpp"

namespace engine {
namespace {

[[noreturn]] void refuse() {
  throw commvq::Error(
      "this program was built without CUDA; configure with COMMVQ_ENABLE_CUDA=ON, or use the CPU");
}

}  // namespace

std::unique_ptr<SequenceCache> make_device_cache(const ModelConfig&,
                                                 const std::vector<commvq::LayerCodec>&, Index, int,
                                                 int) {
  refuse();
}

Learner device_learner() {
  refuse();
}

}  // namespace engine
