#pragma once

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include <Eigen/Core>

#include "engine/model_config.hpp"

/// A Llama model in double precision, written straight from its formulas: all tokens at once, no
/// cache.
namespace commvq::reference {

using Weights = std::map<std::string, std::vector<float>>;
using Eigen::MatrixXd;

/// A stored weight `[rows][cols]`.
inline MatrixXd weight(const Weights& weights, const std::string& name, Index rows, Index cols) {
  const std::vector<float>& values = weights.at(name);
  MatrixXd result(rows, cols);
  for (Index r = 0; r < rows; ++r)
    for (Index c = 0; c < cols; ++c)
      result(r, c) = values.at(static_cast<std::size_t>(r * cols + c));
  return result;
}

inline MatrixXd rms_norm(const MatrixXd& x, const MatrixXd& gain, double eps) {
  MatrixXd result = x;
  for (Index t = 0; t < x.rows(); ++t)
    result.row(t) = x.row(t).cwiseProduct(gain.row(0)) /
                    std::sqrt(x.row(t).squaredNorm() / double(x.cols()) + eps);
  return result;
}

/// RoPE of heads in half-split layout, without scaling: pair i turns by t theta^(-2i / head_dim).
inline MatrixXd rotate(const MatrixXd& heads, Index head_dim, double theta) {
  MatrixXd result = heads;
  for (Index t = 0; t < heads.rows(); ++t)
    for (Index first = 0; first < heads.cols(); first += head_dim)
      for (Index i = 0; i < head_dim / 2; ++i) {
        const double angle = double(t) * std::pow(theta, -2.0 * double(i) / double(head_dim));
        const double re = heads(t, first + i), im = heads(t, first + i + head_dim / 2);
        result(t, first + i) = re * std::cos(angle) - im * std::sin(angle);
        result(t, first + i + head_dim / 2) = re * std::sin(angle) + im * std::cos(angle);
      }
  return result;
}

inline MatrixXd causal_attention(const MatrixXd& q, const MatrixXd& k, const MatrixXd& v,
                                 Index head_dim) {
  const Index group = q.cols() / k.cols();
  MatrixXd result = MatrixXd::Zero(q.rows(), q.cols());
  for (Index head = 0; head < q.cols() / head_dim; ++head)
    for (Index t = 0; t < q.rows(); ++t) {
      const Index column = head / group * head_dim;
      Eigen::VectorXd scores = k.block(0, column, t + 1, head_dim) *
                               q.block(t, head * head_dim, 1, head_dim).transpose() /
                               std::sqrt(double(head_dim));
      scores = (scores.array() - scores.maxCoeff()).exp();
      result.block(t, head * head_dim, 1, head_dim) =
          (scores / scores.sum()).transpose() * v.block(0, column, t + 1, head_dim);
    }
  return result;
}

/// Logits `[tokens][vocab_size]`.
inline MatrixXd llama_logits(const engine::ModelConfig& config, const Weights& weights,
                             const std::vector<int>& tokens) {
  const Index hidden = config.hidden_size, inner = config.intermediate_size;
  const MatrixXd embeddings =
      weight(weights, "model.embed_tokens.weight", config.vocab_size, hidden);
  MatrixXd x(static_cast<Index>(tokens.size()), hidden);
  for (std::size_t t = 0; t < tokens.size(); ++t)
    x.row(static_cast<Index>(t)) = embeddings.row(tokens[t]);
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const auto load = [&](const std::string& name, Index rows, Index cols) {
      return weight(weights, "model.layers." + std::to_string(layer) + "." + name + ".weight", rows,
                    cols);
    };
    const double eps = config.rms_norm_eps, theta = config.rope.theta;
    const MatrixXd input = rms_norm(x, load("input_layernorm", 1, hidden), eps);
    const MatrixXd q = input * load("self_attn.q_proj", config.q_size(), hidden).transpose();
    const MatrixXd k = input * load("self_attn.k_proj", config.kv_size(), hidden).transpose();
    const MatrixXd v = input * load("self_attn.v_proj", config.kv_size(), hidden).transpose();
    x += causal_attention(rotate(q, config.head_dim(), theta), rotate(k, config.head_dim(), theta),
                          v, config.head_dim()) *
         load("self_attn.o_proj", hidden, config.q_size()).transpose();
    const MatrixXd mlp = rms_norm(x, load("post_attention_layernorm", 1, hidden), eps);
    MatrixXd gate = mlp * load("mlp.gate_proj", inner, hidden).transpose();
    gate = gate.array() / (1 + (-gate.array()).exp());
    x += gate.cwiseProduct(mlp * load("mlp.up_proj", inner, hidden).transpose()) *
         load("mlp.down_proj", hidden, inner).transpose();
  }
  const MatrixXd head = config.tied_embeddings
                            ? embeddings
                            : weight(weights, "lm_head.weight", config.vocab_size, hidden);
  return rms_norm(x, weight(weights, "model.norm.weight", 1, hidden), config.rms_norm_eps) *
         head.transpose();
}

}  // namespace commvq::reference
