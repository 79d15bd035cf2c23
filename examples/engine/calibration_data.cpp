#include "engine/calibration_data.hpp"

#include <algorithm>

#include "engine/evaluation.hpp"

namespace engine {
namespace {

void append(std::vector<float>& to, MatrixView<const float> rows) {
  for (Index t = 0; t < rows.rows; ++t) to.insert(to.end(), rows.row(t), rows.row(t) + rows.cols);
}

}  // namespace

std::vector<std::vector<int>> spread_contexts(const std::vector<int>& text, int context,
                                              int tokens) {
  const auto all = windows_of(text, context, 0);
  const auto count =
      std::clamp<std::size_t>(static_cast<std::size_t>(tokens / context), 1, all.size());
  std::vector<std::vector<int>> contexts;
  for (std::size_t i = 0; i < count; ++i) contexts.push_back(all[i * all.size() / count]);
  return contexts;
}

CalibrationData collect(const Model& model, const std::vector<std::vector<int>>& contexts,
                        const std::function<void(double)>& progress) {
  const ModelConfig& config = model.config();
  CalibrationData data;
  data.context = static_cast<Index>(contexts[0].size());
  data.layers.assign(static_cast<std::size_t>(config.num_layers),
                     {{}, {}, commvq::QueryStatistics(config.rope.pairs, config.num_kv_heads)});
  for (std::size_t i = 0; i < contexts.size(); ++i) {
    if (progress) progress(double(i) / double(contexts.size()));
    commvq::Cache cache = model.make_cache({});
    model.prefill(contexts[i], cache, Logits::kNone,
                  [&](int layer, auto queries, auto keys, auto values) {
                    LayerData& of_layer = data.layers[static_cast<std::size_t>(layer)];
                    of_layer.queries.add(queries);
                    append(of_layer.keys, keys);
                    append(of_layer.values, values);
                  });
  }
  return data;
}

}  // namespace engine
