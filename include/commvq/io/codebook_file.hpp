#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "commvq/core/export.h"
#include "commvq/key_codec/key_codec.hpp"
#include "commvq/rope/rope.hpp"
#include "commvq/value_codec/value_codec.hpp"

namespace commvq {

/// How one layer stores what has left the exact window. A null codec keeps that side exact.
struct LayerCodec {
  std::shared_ptr<const KeyCodec> keys;
  std::shared_ptr<const ValueCodec> values;
};

/// Codecs of a whole model, and what they belong to.
struct COMMVQ_API ModelCodecs {
  RopeConfig rope;
  int num_kv_heads = 0;
  std::vector<LayerCodec> layers;
  /// Names the model whose keys and values were learnt from; compared by `require_model`.
  std::string model_digest;
  /// Free text on how the codecs were made: program, seed, data.
  std::string provenance;

  /// Throws `Error` if layers and shapes do not fit each other.
  void validate() const;
  /// Throws `Error` saying what differs, unless these codecs were learnt from such a model.
  void require_model(const RopeConfig& rope, int num_kv_heads, int num_layers,
                     const std::string& digest) const;
};

/// Writes one safetensors file: the format version and the full configuration are JSON in its
/// metadata; tied codebooks store one book per stage. Codebooks and weights are kept as F32, so
/// that what is loaded encodes exactly like what was saved.
COMMVQ_API void save_codecs(const std::filesystem::path& path, const ModelCodecs& codecs);

/// Reads what `save_codecs` wrote. Throws `Error` for another format or version, for a
/// configuration out of range, and for missing, misshapen or non-finite tensors.
COMMVQ_API ModelCodecs load_codecs(const std::filesystem::path& path);

}  // namespace commvq
