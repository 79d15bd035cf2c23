#include "engine/model_config.hpp"

#include "commvq/core/error.hpp"

#include <nlohmann/json.hpp>

#include "engine/json_file.hpp"

namespace engine {
namespace {

using Json = nlohmann::json;

int whole_number(const Json& config, const char* name) {
  commvq::require(config.contains(name) && config[name].is_number_integer(), "config.json: ", name,
                  config.contains(name) ? " is " + shown(config[name]) : " is missing",
                  "; it must be a whole number");
  const Json& value = config[name];
  commvq::require(value >= 1 && value <= (1 << 24), "config.json: ", name, " is ", shown(value),
                  "; it must be in [1, 16777216]");
  return value.get<int>();
}

/// Throws unless `name` is absent, null or one of the values that change nothing here.
void require_default(const Json& config, const char* name, const Json& expected) {
  if (!config.contains(name) || config[name].is_null()) return;
  commvq::require(config[name] == expected, "config.json: ", name, " is ", shown(config[name]),
                  "; this engine computes ", expected.dump(), " only");
}

}  // namespace

ModelConfig load_model_config(const std::filesystem::path& folder) {
  ModelConfig config;
  config.text = read_json_text(folder / "config.json");
  const Json json = parse_json(config.text, folder / "config.json");
  commvq::require(json.is_object(), (folder / "config.json").string(), " is not a JSON object");
  commvq::require(json.contains("model_type"), "config.json: model_type is missing");
  require_default(json, "model_type", "llama");
  require_default(json, "hidden_act", "silu");
  require_default(json, "attention_bias", false);
  require_default(json, "mlp_bias", false);
  require_default(json, "pretraining_tp", 1);

  config.hidden_size = whole_number(json, "hidden_size");
  config.intermediate_size = whole_number(json, "intermediate_size");
  config.num_layers = whole_number(json, "num_hidden_layers");
  config.num_q_heads = whole_number(json, "num_attention_heads");
  const bool grouped =
      json.contains("num_key_value_heads") && !json["num_key_value_heads"].is_null();
  config.num_kv_heads = grouped ? whole_number(json, "num_key_value_heads") : config.num_q_heads;
  commvq::require(config.num_q_heads % config.num_kv_heads == 0,
                  "config.json: ", "num_attention_heads ", config.num_q_heads,
                  " is not a multiple of num_key_value_heads ", config.num_kv_heads);
  config.vocab_size = whole_number(json, "vocab_size");
  config.max_positions = whole_number(json, "max_position_embeddings");
  if (json.contains("rms_norm_eps")) {
    const Json& eps = json["rms_norm_eps"];
    commvq::require(eps.is_number() && eps >= 0 && eps <= 1, "config.json: rms_norm_eps is ",
                    shown(eps), "; it must be a number in [0, 1]");
    config.rms_norm_eps = eps.get<float>();
  }
  if (json.contains("tie_word_embeddings")) {
    commvq::require(json["tie_word_embeddings"].is_boolean(),
                    "config.json: tie_word_embeddings is ", shown(json["tie_word_embeddings"]),
                    "; it must be true or false");
    config.tied_embeddings = json["tie_word_embeddings"].get<bool>();
  }
  config.rope = commvq::parse_hf_rope(config.text);
  constexpr int kMaxChannels = 1 << 24;
  commvq::require(config.num_q_heads <= kMaxChannels / config.head_dim(),
                  "config.json: ", config.num_q_heads, " heads of ", config.head_dim(),
                  " are more than ", kMaxChannels, " channels");
  return config;
}

}  // namespace engine
