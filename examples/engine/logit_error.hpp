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

/// The queries and keys of every layer over one window, run exactly: what coded keys are compared
/// on.
class LogitProbe {
 public:
  /// Keeps the last `num_queries` queries of each layer.
  LogitProbe(const Model& model, std::span<const int> window, Index num_queries = 32);

  /// Codes the keys of every layer and compares the logits of the queries, over keys older than the
  /// newest `exact_window`. `layers` has one entry a layer; empty ones, whose keys stay exact, add
  /// nothing.
  LogitError error_of(const std::vector<KeyRoundTrip>& layers, Index exact_window) const;

 private:
  /// Rows are tokens: `[num_q_heads * head_dim]` and `[num_kv_heads * head_dim]`, before RoPE.
  struct Layer {
    std::vector<float> queries, keys;
  };

  ModelConfig config_;
  std::vector<Layer> layers_;
};

}  // namespace engine
