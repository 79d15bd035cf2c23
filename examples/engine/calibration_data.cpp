#include "engine/calibration_data.hpp"

#include <algorithm>
#include <mutex>

#include "engine/evaluation.hpp"
#include "engine/parallel.hpp"

namespace engine {
namespace {

void copy_rows(MatrixView<const float> rows, Index first, std::vector<float>& to) {
  for (Index t = 0; t < rows.rows; ++t)
    std::copy_n(rows.row(t), rows.cols, to.begin() + (first + t) * rows.cols);
}

}  // namespace

std::vector<std::vector<int>> evenly(const std::vector<std::vector<int>>& contexts,
                                     std::size_t count) {
  std::vector<std::vector<int>> chosen;
  for (std::size_t i = 0; i < count; ++i) chosen.push_back(contexts[i * contexts.size() / count]);
  return chosen;
}

std::vector<std::vector<int>> spread_contexts(const std::vector<int>& text, int context,
                                              int tokens, const std::vector<int>& prefix) {
  const auto all = windows_of(text, context, 0, prefix);
  const auto count =
      std::clamp<std::size_t>(static_cast<std::size_t>(tokens / context), 1, all.size());
  return evenly(all, count);
}

CalibrationData collect(const Model& model, const std::vector<std::vector<int>>& contexts,
                        const std::function<void(double)>& progress,
                        const std::function<bool(int layer)>& wanted) {
  const ModelConfig& config = model.config();
  const commvq::QueryStatistics no_queries(config.rope.pairs, config.num_kv_heads);
  const auto num_layers = static_cast<std::size_t>(config.num_layers);
  CalibrationData data;
  data.context = static_cast<Index>(contexts[0].size());
  const auto size =
      contexts.size() * contexts[0].size() * static_cast<std::size_t>(config.kv_size());
  data.layers.assign(num_layers, {{}, {}, no_queries});
  for (std::size_t layer = 0; layer < num_layers; ++layer) {
    if (wanted && !wanted(static_cast<int>(layer))) continue;
    data.layers[layer].keys.resize(size);
    data.layers[layer].values.resize(size);
  }
  // Added up in the contexts' order in the end, whatever order they are done in.
  std::vector<std::vector<commvq::QueryStatistics>> queries(contexts.size(),
                                                            std::vector(num_layers, no_queries));
  std::mutex mutex;
  Index num_done = 0;
  for_each_task(static_cast<Index>(contexts.size()), [&](Index context) {
    const auto at = static_cast<std::size_t>(context);
    std::vector<Index> first(num_layers, context * data.context);  // of the next chunk
    commvq::Cache cache = model.make_cache({});
    model.prefill(contexts[at], cache, Logits::kNone,
                  [&](int index, auto of_queries, auto keys, auto values) {
                    const auto layer = static_cast<std::size_t>(index);
                    if (data.layers[layer].keys.empty()) return;
                    queries[at][layer].add(of_queries);
                    copy_rows(keys, first[layer], data.layers[layer].keys);
                    copy_rows(values, first[layer], data.layers[layer].values);
                    first[layer] += keys.rows;
                  });
    const std::lock_guard lock(mutex);
    if (progress) progress(double(++num_done) / double(contexts.size()));
  });
  for (const auto& of_context : queries)
    for (std::size_t layer = 0; layer < num_layers; ++layer)
      data.layers[layer].queries.add(of_context[layer]);
  return data;
}

}  // namespace engine
