#pragma once

#include <span>
#include <vector>

#include "engine/model.hpp"

namespace engine {

/// How far coded keys move attention logits, over pairs of a query and a key older than the exact
/// window.
struct LogitError {
  double squared_error = 0;   ///< sum of (q . k_coded - q . k)^2 / head_dim, RoPE applied
  double squared_logits = 0;  ///< sum of squared exact logits after subtracting each query's mean
  double count = 0;           ///< pairs

  double rms() const;
  double relative() const;  ///< rms error over the spread of the exact logits
};

/// Runs one window exactly, codes the keys of every layer and compares the logits of its last
/// `num_queries` queries. Layers whose codec keeps keys exact add nothing.
LogitError logit_error(const Model& model, const std::vector<commvq::LayerCodec>& codecs,
                       std::span<const int> window, Index exact_window, Index num_queries = 32);

}  // namespace engine
