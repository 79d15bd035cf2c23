#pragma once

#include <string>
#include <vector>

#include "commvq/io/safetensors.hpp"

#include "engine/model_config.hpp"

namespace engine {

/// Weights of one layer in FP32; matrices are `[out][in]`.
struct LayerWeights {
  std::vector<float> attention_norm, mlp_norm;  ///< [hidden_size]
  std::vector<float> q, k, v, o;
  std::vector<float> q_bias, k_bias, v_bias;  ///< empty without `qkv_bias`
  std::vector<float> q_norm, k_norm;          ///< [head_dim]; empty without `qk_norm`
  std::vector<float> gate, up, down;
};

struct ModelWeights {
  std::vector<float> embeddings;  ///< [vocab_size][hidden_size]
  std::vector<float> head;        ///< [vocab_size][hidden_size]; empty where tied
  std::vector<float> final_norm;  ///< [hidden_size]
  std::vector<LayerWeights> layers;
  /// Hash of the configuration and of all that makes keys and values from a layer's input.
  std::string digest;
};

/// Reads the weights that `config` asks for. Throws `commvq::Error` for a tensor that is missing or
/// misshapen, and for one that this engine has no use for, since leaving it out would change the
/// model.
ModelWeights load_weights(const commvq::Checkpoint& checkpoint, const ModelConfig& config);

}  // namespace engine
