#pragma once

#include <functional>
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

/// Replaces the keys of one layer, `[tokens][num_kv_heads * head_dim]`, positions from 0 on, before
/// RoPE, by what attention reads once they are coded: decoded and rotated.
using KeyRoundTrip = std::function<void(MatrixView<float> keys)>;

/// Runs one window exactly, codes the keys of every layer and compares the logits of its last
/// `num_queries` queries. `layers` has one entry a layer; empty ones, whose keys stay exact, add
/// nothing.
LogitError logit_error(const Model& model, const std::vector<KeyRoundTrip>& layers,
                       std::span<const int> window, Index exact_window, Index num_queries = 32);

}  // namespace engine
