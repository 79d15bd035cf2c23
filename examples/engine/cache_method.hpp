#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "commvq/io/codebook_file.hpp"

#include "engine/logit_error.hpp"
#include "engine/model.hpp"
#include "engine/peers/peer_cache.hpp"

namespace engine {

/// One way to store the cache of a model, as `evaluate` compares them.
struct CacheMethod {
  std::string name;
  double bits_per_number = 16;  ///< norms, scales and zeros included
  bool packed = true;  ///< whether its caches allocate so many bits; peers keep all decoded
  /// Makes an empty cache of one sequence. Any number of threads may call at once.
  std::function<std::unique_ptr<SequenceCache>()> new_cache;
  std::vector<KeyRoundTrip> key_round_trips;  ///< one a layer; none if keys are exact
};

/// Bits that a page allocates for a number of a coded token, a mean over the layers, whose keys
/// have `num_channels` numbers and whose values as many.
double bits_per_number(const commvq::Cache& cache, Index num_channels);

/// `commvq::Cache` with these codecs, one a layer, or exact where there are none.
CacheMethod codec_method(std::string name, const Model& model,
                         const std::vector<commvq::LayerCodec>& codecs, Index window, Index sinks);

/// `PeerCache` with these peers, one a layer.
CacheMethod peer_method(std::string name, const Model& model, const std::vector<PeerLayer>& layers,
                        Index window, Index sinks);

}  // namespace engine
