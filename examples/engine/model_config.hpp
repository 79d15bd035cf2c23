#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "commvq/core/view.hpp"
#include "commvq/rope/rope.hpp"

namespace engine {

using commvq::Index;

/// Shape of a Llama-like model, from the `config.json` of a Hugging Face folder.
struct ModelConfig {
  std::string model_type;  ///< llama, mistral, qwen2 or qwen3
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_layers = 0;
  int num_q_heads = 0;
  int num_kv_heads = 0;
  int vocab_size = 0;
  int max_positions = 0;  ///< context the model was trained for
  float rms_norm_eps = 1e-6f;
  bool tied_embeddings = false;
  bool qkv_bias = false;  ///< biases of the query, key and value projections (qwen2)
  bool qk_norm = false;   ///< RMSNorm of every query and key head before RoPE (qwen3)
  /// By layer: a query sees the newest so many tokens, itself included; 0: all.
  std::vector<Index> sliding_windows;
  commvq::RopeConfig rope;
  int first_token = 0;           ///< bos_token_id, else an end token, else 0
  std::vector<int> stop_tokens;  ///< eos_token_id of generation_config.json, else of config.json
  std::string text;              ///< config.json itself

  int head_dim() const { return rope.pairs.head_dim; }
  int q_size() const { return num_q_heads * head_dim(); }
  int kv_size() const { return num_kv_heads * head_dim(); }
};

/// Reads and checks `folder/config.json`, and `folder/generation_config.json` where there is one.
/// Throws `commvq::Error` for model families, activations and options that this engine does not
/// compute, naming the field and its value.
ModelConfig load_model_config(const std::filesystem::path& folder);

}  // namespace engine
