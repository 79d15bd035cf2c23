#include "engine/logit_error.hpp"

#include <algorithm>
#include <cmath>

#include <Eigen/Core>

namespace engine {
namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

MatrixView<float> view(Matrix& m) {
  return {m.data(), m.rows(), m.cols()};
}

/// Rows of `cols` numbers.
Matrix matrix_of(const std::vector<float>& numbers, Index cols) {
  return Eigen::Map<const Matrix>(numbers.data(), static_cast<Index>(numbers.size()) / cols, cols);
}

void append(std::vector<float>& to, MatrixView<const float> rows) {
  for (Index t = 0; t < rows.rows; ++t) to.insert(to.end(), rows.row(t), rows.row(t) + rows.cols);
}

void add_layer(const ModelConfig& config, const KeyRoundTrip& code, Matrix queries, Matrix keys,
               Index exact_window, LogitError& error) {
  Matrix coded = keys;
  code(view(coded));
  const commvq::Rope rope(config.rope);
  const Index first_query = keys.rows() - queries.rows();
  rope.apply(view(keys), 0);
  rope.apply(view(queries), first_query);
  const Index head_dim = config.head_dim(), per_kv_head = config.num_q_heads / config.num_kv_heads;
  for (Index i = 0; i < queries.rows(); ++i) {
    const Index visible = first_query + i + 1 - exact_window;
    if (visible < 2) continue;
    for (Index head = 0; head < config.num_q_heads; ++head) {
      const auto query = queries.row(i).segment(head * head_dim, head_dim);
      const Index column = head / per_kv_head * head_dim;
      const Eigen::VectorXf exact = keys.block(0, column, visible, head_dim) * query.transpose();
      const Eigen::VectorXf moved = coded.block(0, column, visible, head_dim) * query.transpose();
      error.squared_error += double((moved - exact).squaredNorm()) / double(head_dim);
      error.squared_logits +=
          double((exact.array() - exact.mean()).matrix().squaredNorm()) / double(head_dim);
      error.count += double(visible);
    }
  }
}

}  // namespace

double LogitError::rms() const {
  return count > 0 ? std::sqrt(squared_error / count) : 0;
}
double LogitError::relative() const {
  return squared_logits > 0 ? std::sqrt(squared_error / squared_logits) : 0;
}

LogitProbe::LogitProbe(const Model& model, std::span<const int> window, Index num_queries)
    : config_(model.config()), layers_(static_cast<std::size_t>(model.config().num_layers)) {
  commvq::Cache cache = model.make_cache({});
  model.prefill(window, cache, Logits::kNone, [&](int i, auto queries, auto keys, auto) {
    Layer& layer = layers_[static_cast<std::size_t>(i)];
    append(layer.keys, keys);
    append(layer.queries, queries);
    const auto kept = static_cast<std::size_t>(num_queries * config_.q_size());
    if (layer.queries.size() > kept)
      layer.queries.erase(layer.queries.begin(), layer.queries.end() - kept);
  });
}

LogitError LogitProbe::error_of(const std::vector<KeyRoundTrip>& layers, Index exact_window) const {
  LogitError error;
  for (std::size_t i = 0; i < layers.size(); ++i)
    if (layers[i])
      add_layer(config_, layers[i], matrix_of(layers_[i].queries, config_.q_size()),
                matrix_of(layers_[i].keys, config_.kv_size()), exact_window, error);
  return error;
}

}  // namespace engine
