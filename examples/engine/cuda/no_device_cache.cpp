// In place of device_cache.cpp where CUDA is not built.
#include "commvq/core/error.hpp"

#include "engine/device_cache.hpp"

namespace engine {

std::unique_ptr<SequenceCache> make_device_cache(const ModelConfig&,
                                                 const std::vector<commvq::LayerCodec>&, Index, int,
                                                 int) {
  throw commvq::Error(
      "this program was built without CUDA; configure with COMMVQ_ENABLE_CUDA=ON, or use the CPU");
}

}  // namespace engine
