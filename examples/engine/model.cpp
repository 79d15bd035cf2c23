#include "engine/model.hpp"

#include <algorithm>
#include <cmath>

#include "commvq/core/parallel_errors.hpp"
#include "commvq/io/safetensors.hpp"

#include <Eigen/Core>

#include "engine/hash.hpp"

namespace engine {
namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using ConstMatrixMap = Eigen::Map<const Matrix>;

MatrixView<const float> view(const Matrix& m) {
  return {m.data(), m.rows(), m.cols()};
}

/// x W^T with `weight` stored `[out][in]`.
Matrix linear(const Matrix& x, const std::vector<float>& weight) {
  const Index in = x.cols(), out = static_cast<Index>(weight.size()) / in;
  Matrix result(x.rows(), out);
  result.noalias() = x * ConstMatrixMap(weight.data(), out, in).transpose();
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

/// Appends to each segment's cache and attends, side by side where there are several sequences.
void attend_segments(std::span<const Segment> segments, int layer, MatrixView<const float> q,
                     MatrixView<const float> k, MatrixView<const float> v, Matrix& attended) {
  std::vector<Index> begins = {0};
  for (const Segment& segment : segments)
    begins.push_back(begins.back() + static_cast<Index>(segment.tokens.size()));
  commvq::ParallelErrors errors;
#pragma omp parallel for schedule(dynamic) if (segments.size() > 1)
  for (std::size_t s = 0; s < segments.size(); ++s)
    errors.guard([&] {
      const Index first = begins[s], count = begins[s + 1] - begins[s];
      segments[s].cache.append_and_attend(
          layer, q.middle_rows(first, count), k.middle_rows(first, count),
          v.middle_rows(first, count), {attended.row(first).data(), count, attended.cols()});
    });
  errors.rethrow();
}

}  // namespace

Model::Model(const std::filesystem::path& folder) : config_(load_model_config(folder)) {
  const commvq::Checkpoint checkpoint(folder);
  const Index hidden = config_.hidden_size, inner = config_.intermediate_size;
  const Index vocab = config_.vocab_size, q = config_.q_size(), kv = config_.kv_size();
  Hash hash;
  hash.add(config_.text);

  embeddings_ = checkpoint.at("model.embed_tokens.weight").to_floats({vocab, hidden});
  if (!config_.tied_embeddings) head_ = checkpoint.at("lm_head.weight").to_floats({vocab, hidden});
  final_norm_ = checkpoint.at("model.norm.weight").to_floats({hidden});
  for (int i = 0; i < config_.num_layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    const auto load = [&](const char* name, std::vector<Index> shape) {
      return checkpoint.at(prefix + name + ".weight").to_floats(shape);
    };
    for (const char* name : {"self_attn.k_proj.weight", "self_attn.v_proj.weight"})
      hash.add(checkpoint.at(prefix + name).data);
    layers_.push_back(
        {load("input_layernorm", {hidden}), load("post_attention_layernorm", {hidden}),
         load("self_attn.q_proj", {q, hidden}), load("self_attn.k_proj", {kv, hidden}),
         load("self_attn.v_proj", {kv, hidden}), load("self_attn.o_proj", {hidden, q}),
         load("mlp.gate_proj", {inner, hidden}), load("mlp.up_proj", {inner, hidden}),
         load("mlp.down_proj", {hidden, inner})});
  }
  digest_ = hash.text();
}

commvq::Cache Model::make_cache(std::vector<commvq::LayerCodec> codecs, Index window, Index sinks,
                                commvq::FloatType exact_type) const {
  if (codecs.empty()) codecs.resize(layers_.size());
  commvq::require(codecs.size() == layers_.size(), "codecs for ", codecs.size(),
                  " layers; the model has ", layers_.size());
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
      x.row(row++) = ConstMatrixMap(embeddings_.data(), config_.vocab_size, x.cols()).row(token);
    }
    last_rows.push_back(row - 1);
  }

  Matrix attended(num_tokens, config_.q_size());
  for (int i = 0; i < config_.num_layers; ++i) {
    const Layer& layer = layers_[static_cast<std::size_t>(i)];
    const Matrix normed = rms_norm(x, layer.attention_norm, config_.rms_norm_eps);
    const Matrix q = linear(normed, layer.q), k = linear(normed, layer.k);
    const Matrix v = linear(normed, layer.v);
    if (observer) observer(i, view(q), view(k), view(v));
    attend_segments(segments, i, view(q), view(k), view(v), attended);
    x += linear(attended, layer.o);
    const Matrix mlp_input = rms_norm(x, layer.mlp_norm, config_.rms_norm_eps);
    Matrix gate = linear(mlp_input, layer.gate);
    gate.array() = gate.array() / (1.0f + (-gate.array()).exp());
    x += linear(gate.cwiseProduct(linear(mlp_input, layer.up)), layer.down);
  }

  if (logits == Logits::kNone) return {};
  Matrix chosen = x;
  if (logits == Logits::kLastOfSegment) {
    chosen.resize(static_cast<Index>(last_rows.size()), x.cols());
    for (Index i = 0; i < chosen.rows(); ++i)
      chosen.row(i) = x.row(last_rows[static_cast<std::size_t>(i)]);
  }
  const Matrix result = linear(rms_norm(chosen, final_norm_, config_.rms_norm_eps),
                               config_.tied_embeddings ? embeddings_ : head_);
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
