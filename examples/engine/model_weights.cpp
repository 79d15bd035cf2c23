#include "engine/model_weights.hpp"

#include <set>

#include "commvq/core/error.hpp"

#include "engine/hash.hpp"

namespace engine {
namespace {

/// Reads tensors and remembers which.
class Reader {
 public:
  explicit Reader(const commvq::Checkpoint& checkpoint) : checkpoint_(checkpoint) {}

  std::vector<float> floats(const std::string& name, const std::vector<Index>& shape) {
    read_.insert(name);
    return checkpoint_.at(name).to_floats(shape);
  }

  /// `tied`: the output head is the embeddings, whether or not it is stored again.
  void require_all_read(bool tied) const {
    for (const std::string& name : checkpoint_.names()) {
      const bool known = read_.count(name) != 0 || name.ends_with(".rotary_emb.inv_freq") ||
                         (tied && name == "lm_head.weight");
      commvq::require(known, "the checkpoint holds tensor ", name,
                      ", which this engine does not compute with");
    }
  }

 private:
  const commvq::Checkpoint& checkpoint_;
  std::set<std::string> read_;
};

LayerWeights load_layer(Reader& reader, const ModelConfig& config, const std::string& prefix) {
  const Index hidden = config.hidden_size, inner = config.intermediate_size;
  const Index q = config.q_size(), kv = config.kv_size();
  const auto load = [&](const char* name, const std::vector<Index>& shape) {
    return reader.floats(prefix + name, shape);
  };
  LayerWeights layer;
  layer.attention_norm = load("input_layernorm.weight", {hidden});
  layer.mlp_norm = load("post_attention_layernorm.weight", {hidden});
  layer.q = load("self_attn.q_proj.weight", {q, hidden});
  layer.k = load("self_attn.k_proj.weight", {kv, hidden});
  layer.v = load("self_attn.v_proj.weight", {kv, hidden});
  layer.o = load("self_attn.o_proj.weight", {hidden, q});
  if (config.qkv_bias) {
    layer.q_bias = load("self_attn.q_proj.bias", {q});
    layer.k_bias = load("self_attn.k_proj.bias", {kv});
    layer.v_bias = load("self_attn.v_proj.bias", {kv});
  }
  if (config.qk_norm) {
    layer.q_norm = load("self_attn.q_norm.weight", {config.head_dim()});
    layer.k_norm = load("self_attn.k_norm.weight", {config.head_dim()});
  }
  layer.gate = load("mlp.gate_proj.weight", {inner, hidden});
  layer.up = load("mlp.up_proj.weight", {inner, hidden});
  layer.down = load("mlp.down_proj.weight", {hidden, inner});
  return layer;
}

std::string prefix_of(int layer) {
  return "model.layers." + std::to_string(layer) + ".";
}

std::string digest_of(const commvq::Checkpoint& checkpoint, const ModelConfig& config) {
  std::vector<std::string> names = {"self_attn.k_proj.weight", "self_attn.v_proj.weight"};
  if (config.qkv_bias)
    names.insert(names.end(), {"self_attn.k_proj.bias", "self_attn.v_proj.bias"});
  if (config.qk_norm) names.push_back("self_attn.k_norm.weight");
  Hash hash;
  hash.add(config.text);
  for (int i = 0; i < config.num_layers; ++i)
    for (const std::string& name : names) hash.add(checkpoint.at(prefix_of(i) + name).data);
  return hash.text();
}

}  // namespace

ModelWeights load_weights(const commvq::Checkpoint& checkpoint, const ModelConfig& config) {
  Reader reader(checkpoint);
  const Index hidden = config.hidden_size, vocab = config.vocab_size;
  ModelWeights weights;
  weights.embeddings = reader.floats("model.embed_tokens.weight", {vocab, hidden});
  if (!config.tied_embeddings) weights.head = reader.floats("lm_head.weight", {vocab, hidden});
  weights.final_norm = reader.floats("model.norm.weight", {hidden});
  for (int i = 0; i < config.num_layers; ++i)
    weights.layers.push_back(load_layer(reader, config, prefix_of(i)));
  reader.require_all_read(config.tied_embeddings);
  weights.digest = digest_of(checkpoint, config);
  return weights;
}

}  // namespace engine
