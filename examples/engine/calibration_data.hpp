#pragma once

#include <functional>
#include <vector>

#include "commvq/learner/query_statistics.hpp"

#include "engine/model.hpp"

namespace engine {

/// What a layer computed over calibration text, one row a token: keys and values
/// `[tokens][num_kv_heads * head_dim]`, before RoPE, and what its queries weigh.
struct LayerData {
  std::vector<float> keys, values;
  commvq::QueryStatistics queries;
};

/// What the layers of a model computed over calibration text.
struct CalibrationData {
  Index context = 0;  ///< tokens of each context; the first stands at position 0
  std::vector<LayerData> layers;
};

/// `count` of the contexts, at most all, spread over them from the first one on.
std::vector<std::vector<int>> evenly(const std::vector<std::vector<int>>& contexts,
                                     std::size_t count);

/// About `tokens` tokens of `text` in contexts of `context`, at least one, spread over the text:
/// its beginning may be all of one kind. Each begins with `prefix`. Throws `commvq::Error` if the
/// text has not enough tokens for one.
std::vector<std::vector<int>> spread_contexts(const std::vector<int>& text, int context, int tokens,
                                              const std::vector<int>& prefix = {});

/// Runs the model over contexts of equal length, exactly, side by side, and keeps what the layers
/// computed: all, or those that `wanted` says; the others stay empty. `progress`, if given,
/// receives the share that is done, one call at a time.
CalibrationData collect(const Model& model, const std::vector<std::vector<int>>& contexts,
                        const std::function<void(double)>& progress = {},
                        const std::function<bool(int layer)>& wanted = {});

}  // namespace engine
