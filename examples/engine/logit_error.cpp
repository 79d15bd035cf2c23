#include "engine/logit_error.hpp"

#include <algorithm>
#include <cmath>

#include <Eigen/Core>

namespace engine {
namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Rows of a view appended below a matrix.
void append(Matrix& matrix, MatrixView<const float> rows) {
  const Index old = matrix.rows();
  matrix.conservativeResize(old + rows.rows, rows.cols);
  for (Index t = 0; t < rows.rows; ++t)
    std::copy_n(rows.row(t), rows.cols, matrix.row(old + t).data());
}

MatrixView<float> view(Matrix& m) {
  return {m.data(), m.rows(), m.cols()};
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

LogitError logit_error(const Model& model, const std::vector<KeyRoundTrip>& layers,
                       std::span<const int> window, Index exact_window, Index num_queries) {
  std::vector<Matrix> queries(layers.size()), keys(layers.size());
  commvq::Cache cache = model.make_cache({});
  model.prefill(window, cache, Logits::kNone, [&](int layer, auto q, auto k, auto) {
    append(keys[static_cast<std::size_t>(layer)], k);
    append(queries[static_cast<std::size_t>(layer)], q);
  });
  LogitError error;
  for (std::size_t i = 0; i < layers.size(); ++i)
    if (layers[i])
      add_layer(model.config(), layers[i],
                queries[i].bottomRows(std::min<Index>(num_queries, queries[i].rows())), keys[i],
                exact_window, error);
  return error;
}

}  // namespace engine
