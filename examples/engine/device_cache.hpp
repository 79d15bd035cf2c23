#pragma once

#include <memory>
#include <vector>

#include "commvq/io/codebook_file.hpp"

#include "engine/model_config.hpp"
#include "engine/sequence_cache.hpp"

namespace engine {

/// A compressed cache in the memory of the current CUDA device, where attention is computed as
/// well; tokens are coded on the host, so the codes are those of a `commvq::Cache`. `codecs` has
/// one entry a layer; memory for `max_tokens` tokens is taken at once. The newest `window` tokens
/// and the first `sinks` are kept in FP16. Throws `commvq::Error` for more tokens than that, for
/// codecs that the device does not support, for CUDA errors, and always where the engine was built
/// without CUDA.
std::unique_ptr<SequenceCache> make_device_cache(const ModelConfig& config,
                                                 const std::vector<commvq::LayerCodec>& codecs,
                                                 Index max_tokens, int window = 128, int sinks = 0);

}  // namespace engine
