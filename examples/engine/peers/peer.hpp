#pragma once

#include <string>
#include <vector>

#include "engine/calibration_data.hpp"
#include "engine/model_config.hpp"
#include "engine/peers/peer_cache.hpp"

namespace engine {

/// Another method for the KV cache, by name: METHOD_Bbit or METHOD_Bbit_roped, e.g. "kivi_2bit".
/// Keys are coded before RoPE, as commvq does, or rotated where the name ends in "_roped". KIVI's
/// and TurboQuant's own papers do the latter.
struct Peer {
  enum class Method {
    kKivi,      ///< "kivi": `KiviCodec`, keys by channel, values by token
    kRotation,  ///< "rotation": `RotationCodec`
    kProduct,   ///< "pq": `VectorQuantizer`, short sub-vectors
    kResidual,  ///< "rq": `VectorQuantizer`, whole heads in stages
  };

  std::string name;
  Method method = Method::kKivi;
  int bits = 1;  ///< of a code and number; scales, zeros and norms come on top
  bool keys_after_rope = false;

  /// Throws `commvq::Error` for a name that is none, saying what may be.
  static Peer parse(const std::string& name);

  /// Whether its codebooks are learnt from calibration text.
  bool learnt() const { return method == Method::kProduct || method == Method::kResidual; }

  /// One codec a side and layer. `data` is what every layer computed over the calibration text;
  /// may be empty unless `learnt()`. `seed` draws rotations and starts k-means.
  std::vector<PeerLayer> make_layers(const ModelConfig& config, const CalibrationData& data,
                                     std::uint64_t seed) const;
};

/// Bits of one number of keys and values, over all layers.
double bits_per_number(const std::vector<PeerLayer>& layers, Index num_channels);

}  // namespace engine
