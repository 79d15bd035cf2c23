#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "commvq/attention/attention.hpp"

namespace commvq::reference {

struct AttentionResult {
  std::vector<double> output;  ///< [positions][num_q_heads * head_dim]
  std::vector<double> lse;     ///< [positions][num_q_heads]
};

/// A head at a position, rotated by RoPE, in double precision.
inline std::vector<double> rotated_head(const Rope& rope, const float* channels, Index position) {
  const int head_dim = rope.pairs().head_dim;
  std::vector<double> head(channels, channels + head_dim);
  rope.apply(MatrixView<double>(head.data(), 1, head_dim), position);
  return head;
}

/// Attention of one query head at `position`, written from the formula:
///     o = sum_n p_n v_n,  p = softmax(score),  score_n = scale <R(t) q, R(n) k_n>.
/// `keys` and `values` are `[tokens][num_kv_heads * head_dim]`, of tokens 0, 1, ...
inline double attend_head(const Rope& rope, const float* query, Index position,
                          MatrixView<const float> keys, MatrixView<const float> values,
                          Index first_channel, const AttentionOptions& options, double* output) {
  const int head_dim = rope.pairs().head_dim;
  const std::vector<double> q = rotated_head(rope, query, position);
  const double scale = options.scale != 0 ? options.scale : 1.0 / std::sqrt(double(head_dim));
  const Index oldest = options.sliding_window > 0 ? position + 1 - options.sliding_window : 0;
  const Index first = std::max(Index{0}, oldest);

  std::vector<double> scores;
  for (Index n = first; n <= position; ++n) {
    const std::vector<double> k = rotated_head(rope, keys.row(n) + first_channel, n);
    double score = 0;
    for (std::size_t d = 0; d < k.size(); ++d) score += q[d] * k[d];
    score *= scale;
    if (options.soft_cap > 0) score = options.soft_cap * std::tanh(score / options.soft_cap);
    scores.push_back(score);
  }
  const double largest = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  for (const double score : scores) sum += std::exp(score - largest);
  std::fill(output, output + head_dim, 0.0);
  for (Index n = first; n <= position; ++n) {
    const double p = std::exp(scores[static_cast<std::size_t>(n - first)] - largest) / sum;
    for (int d = 0; d < head_dim; ++d) output[d] += p * values(n, first_channel + d);
  }
  return largest + std::log(sum);
}

/// Attention of the newest positions over what `decode_tokens` says that each of them sees.
inline AttentionResult attention(const LayerCache& cache, MatrixView<const float> queries,
                                 const AttentionOptions& options) {
  const Index length = cache.length();
  const Index channels = cache.config().num_channels();
  const int head_dim = cache.config().rope.pairs.head_dim;
  const Index num_q_heads = queries.cols / head_dim;
  const Index group = num_q_heads / cache.config().num_kv_heads;
  std::vector<float> keys(static_cast<std::size_t>(length * channels));
  std::vector<float> values(keys.size());
  AttentionResult result;
  result.output.resize(static_cast<std::size_t>(queries.rows * queries.cols));
  result.lse.resize(static_cast<std::size_t>(queries.rows * num_q_heads));
  for (Index i = 0; i < queries.rows; ++i) {
    const Index position = length - queries.rows + i;
    const auto key_rows = as_matrix(keys, length, channels);
    const auto value_rows = as_matrix(values, length, channels);
    cache.decode_tokens(position, 0, key_rows, value_rows);
    for (Index h = 0; h < num_q_heads; ++h)
      result.lse[static_cast<std::size_t>(i * num_q_heads + h)] = attend_head(
          cache.rope(), queries.row(i) + h * head_dim, position, key_rows, value_rows,
          h / group * head_dim, options, result.output.data() + i * queries.cols + h * head_dim);
  }
  return result;
}

}  // namespace commvq::reference
