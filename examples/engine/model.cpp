#include "engine/model.hpp"

#include <algorithm>
#include <cmath>

#include "commvq/core/parallel_errors.hpp"
#include "commvq/io/safetensors.hpp"

#include <Eigen/Core>

namespace engine {
namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using ConstMatrixMap = Eigen::Map<const Matrix>;

MatrixView<const float> view(const Matrix& m) {
  return {m.data(), m.rows(), m.cols()};
}

/// x W^T + bias with `weight` stored `[out][in]`; an empty bias is none.
Matrix linear(const Matrix& x, const std::vector<float>& weight,
              const std::vector<float>& bias = {}) {
  const Index in = x.cols(), out = static_cast<Index>(weight.size()) / in;
  Matrix result(x.rows(), out);
  result.noalias() = x * ConstMatrixMap(weight.data(), out, in).transpose();
  if (!bias.empty()) result.rowwise() += Eigen::Map<const Eigen::RowVectorXf>(bias.data(), out);
  return result;
}

Matrix rms_norm(const Matrix& x, const std::vector<float>& weight, float eps) {
  const Eigen::Map<const Eigen::RowVectorXf> gain(weight.data(), x.cols());
  Matrix result(x.rows(), x.cols());
  for (Index t = 0; t < x.rows(); ++t) {
    const float mean_square = x.row(t).squaredNorm() / static_cast<float>(x.cols());
    result.row(t) = x.row(t).cwiseProduct(gain) / std::sqrt(mean_square + eps);
  }
  return result;
}

/// RMSNorm of every head of every row, in place.
void norm_heads(Matrix& heads, const std::vector<float>& weight, float eps) {
  const auto head_dim = static_cast<Index>(weight.size());
  Eigen::Map<Matrix> rows(heads.data(), heads.size() / head_dim, head_dim);
  rows = rms_norm(rows, weight, eps);
}

/// The gated network that follows attention.
Matrix feed_forward(const Matrix& x, const LayerWeights& layer) {
  Matrix gate = linear(x, layer.gate);
  gate.array() = gate.array() / (1.0f + (-gate.array()).exp());
  return linear(gate.cwiseProduct(linear(x, layer.up)), layer.down);
}

/// Appends to each segment's cache and attends, side by side where there are several sequences.
void attend_segments(std::span<const Segment> segments, int layer, Index sliding_window,
                     MatrixView<const float> q, MatrixView<const float> k,
                     MatrixView<const float> v, Matrix& attended) {
  std::vector<Index> begins = {0};
  for (const Segment& segment : segments)
    begins.push_back(begins.back() + static_cast<Index>(segment.tokens.size()));
  commvq::ParallelErrors errors;
#pragma omp parallel for schedule(dynamic) if (segments.size() > 1)
  for (std::size_t s = 0; s < segments.size(); ++s)
    errors.guard([&] {
      const Index first = begins[s], count = begins[s + 1] - begins[s];
      segments[s].cache.append_and_attend(layer, q.middle_rows(first, count),
                                          k.middle_rows(first, count), v.middle_rows(first, count),
                                          sliding_window,
                                          {attended.row(first).data(), count, attended.cols()});
    });
  errors.rethrow();
}

}  // namespace

Model::Model(const std::filesystem::path& folder)
    : config_(load_model_config(folder)),
      weights_(load_weights(commvq::Checkpoint(folder), config_)) {}

commvq::Cache Model::make_cache(std::vector<commvq::LayerCodec> codecs, Index window, Index sinks,
                                commvq::FloatType exact_type) const {
  if (codecs.empty()) codecs.resize(weights_.layers.size());
  commvq::require(codecs.size() == weights_.layers.size(), "codecs for ", codecs.size(),
                  " layers; the model has ", weights_.layers.size());
  commvq::CacheConfig cache;
  cache.rope = config_.rope;
  cache.num_kv_heads = config_.num_kv_heads;
  cache.window = window;
  cache.sinks = sinks;
  cache.exact_type = exact_type;
  return commvq::Cache(cache, std::move(codecs));
}

std::vector<float> Model::forward(std::span<const Segment> segments, Logits logits,
                                  const LayerObserver& observer) const {
  Index num_tokens = 0;
  for (const Segment& segment : segments) num_tokens += static_cast<Index>(segment.tokens.size());
  Matrix x(num_tokens, config_.hidden_size);
  std::vector<Index> last_rows;
  Index row = 0;
  for (const Segment& segment : segments) {
    commvq::require(!segment.tokens.empty(), "a sequence has no tokens to run the model on");
    for (const int token : segment.tokens) {
      commvq::require(token >= 0 && token < config_.vocab_size, "token ", token,
                      " is not in the vocabulary of ", config_.vocab_size);
      x.row(row++) =
          ConstMatrixMap(weights_.embeddings.data(), config_.vocab_size, x.cols()).row(token);
    }
    last_rows.push_back(row - 1);
  }

  Matrix attended(num_tokens, config_.q_size());
  for (int i = 0; i < config_.num_layers; ++i) {
    const LayerWeights& layer = weights_.layers[static_cast<std::size_t>(i)];
    const Matrix normed = rms_norm(x, layer.attention_norm, config_.rms_norm_eps);
    Matrix q = linear(normed, layer.q, layer.q_bias), k = linear(normed, layer.k, layer.k_bias);
    const Matrix v = linear(normed, layer.v, layer.v_bias);
    if (config_.qk_norm) {
      norm_heads(q, layer.q_norm, config_.rms_norm_eps);
      norm_heads(k, layer.k_norm, config_.rms_norm_eps);
    }
    if (observer) observer(i, view(q), view(k), view(v));
    attend_segments(segments, i, config_.sliding_windows[static_cast<std::size_t>(i)], view(q),
                    view(k), view(v), attended);
    x += linear(attended, layer.o);
    x += feed_forward(rms_norm(x, layer.mlp_norm, config_.rms_norm_eps), layer);
  }

  if (logits == Logits::kNone) return {};
  Matrix chosen = x;
  if (logits == Logits::kLastOfSegment) {
    chosen.resize(static_cast<Index>(last_rows.size()), x.cols());
    for (Index i = 0; i < chosen.rows(); ++i)
      chosen.row(i) = x.row(last_rows[static_cast<std::size_t>(i)]);
  }
  const Matrix result = linear(rms_norm(chosen, weights_.final_norm, config_.rms_norm_eps),
                               config_.tied_embeddings ? weights_.embeddings : weights_.head);
  return {result.data(), result.data() + result.size()};
}

std::vector<float> Model::prefill(std::span<const int> tokens, CacheHandle cache, Logits logits,
                                  const LayerObserver& observer) const {
  std::vector<float> result;
  for (std::size_t first = 0; first < tokens.size(); first += kChunkTokens) {
    const std::size_t count = std::min<std::size_t>(kChunkTokens, tokens.size() - first);
    const bool wanted = logits == Logits::kAll || first + count == tokens.size();
    const Segment segment{tokens.subspan(first, count), cache};
    const std::vector<float> part =
        forward({&segment, 1}, wanted ? logits : Logits::kNone, observer);
    result.insert(result.end(), part.begin(), part.end());
  }
  return result;
}

}  // namespace engine
