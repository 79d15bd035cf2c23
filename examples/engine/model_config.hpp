#pragma once

#include <filesystem>
#include <string>

#include "commvq/rope/rope.hpp"

namespace engine {

/// Shape of a Llama model, from the `config.json` of a Hugging Face folder.
struct ModelConfig {
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_layers = 0;
  int num_q_heads = 0;
  int num_kv_heads = 0;
  int vocab_size = 0;
  int max_positions = 0;  ///< context the model was trained for
  float rms_norm_eps = 1e-5f;
  bool tied_embeddings = false;
  commvq::RopeConfig rope;
  std::string text;  ///< the file itself

  int head_dim() const { return rope.pairs.head_dim; }
  int q_size() const { return num_q_heads * head_dim(); }
  int kv_size() const { return num_kv_heads * head_dim(); }
};

/// Reads and checks `folder/config.json`. Throws `commvq::Error` for architectures, activations and
/// options that this engine does not compute, naming the field and its value.
ModelConfig load_model_config(const std::filesystem::path& folder);

}  // namespace engine
