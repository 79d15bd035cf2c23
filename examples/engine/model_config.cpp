#include "engine/model_config.hpp"

#include <algorithm>

#include "commvq/core/error.hpp"

#include <nlohmann/json.hpp>

#include "engine/json_file.hpp"

namespace engine {
namespace {

using Json = nlohmann::json;
using commvq::require;

/// What sets a family of models apart.
struct Family {
  const char* model_type;
  bool qkv_bias;
  bool qk_norm;
};
constexpr Family kFamilies[] = {{"llama", false, false},
                                {"mistral", false, false},
                                {"qwen2", true, false},
                                {"qwen3", false, true}};

bool is_given(const Json& config, const char* name) {
  return config.contains(name) && !config[name].is_null();
}

int whole_number(const Json& config, const char* name) {
  require(config.contains(name) && config[name].is_number_integer(), "config.json: ", name,
          config.contains(name) ? " is " + shown(config[name]) : " is missing",
          "; it must be a whole number");
  const Json& value = config[name];
  require(value >= 1 && value <= (1 << 24), "config.json: ", name, " is ", shown(value),
          "; it must be in [1, 16777216]");
  return value.get<int>();
}

int whole_number_or(const Json& config, const char* name, int otherwise) {
  return is_given(config, name) ? whole_number(config, name) : otherwise;
}

bool flag(const Json& config, const char* name) {
  if (!is_given(config, name)) return false;
  require(config[name].is_boolean(), "config.json: ", name, " is ", shown(config[name]),
          "; it must be true or false");
  return config[name].get<bool>();
}

/// Throws unless `name` is absent, null or the value that changes nothing here.
void require_default(const Json& config, const char* name, const Json& expected) {
  if (!is_given(config, name)) return;
  require(config[name] == expected, "config.json: ", name, " is ", shown(config[name]),
          "; this engine computes ", expected.dump(), " only");
}

const Family& family_of(const Json& config) {
  require(config.contains("model_type"), "config.json: model_type is missing");
  std::string known;
  for (const Family& family : kFamilies) {
    if (config["model_type"] == family.model_type) return family;
    if (!known.empty()) known += ", ";
    known += family.model_type;
  }
  commvq::fail("config.json: model_type is ", shown(config["model_type"]),
               "; this engine computes ", known, " only");
}

/// Qwen writes the kind of every layer, or the first layer that slides.
std::vector<Index> sliding_windows_of_qwen(const Json& config, int num_layers) {
  std::vector<Index> windows(static_cast<std::size_t>(num_layers), 0);
  if (!flag(config, "use_sliding_window")) return windows;
  const Index window = whole_number_or(config, "sliding_window", 4096);
  if (!is_given(config, "layer_types")) {
    const int first = whole_number_or(config, "max_window_layers", 28);
    for (int i = first; i < num_layers; ++i) windows[static_cast<std::size_t>(i)] = window;
    return windows;
  }
  const Json& types = config["layer_types"];
  require(types.is_array() && types.size() == windows.size(), "config.json: layer_types is ",
          shown(types), "; it must name ", num_layers, " layers");
  for (std::size_t i = 0; i < windows.size(); ++i) {
    require(types[i] == "full_attention" || types[i] == "sliding_attention",
            "config.json: layer_types holds ", shown(types[i]),
            "; known are full_attention and sliding_attention");
    if (types[i] == "sliding_attention") windows[i] = window;
  }
  return windows;
}

std::vector<Index> sliding_windows(const Json& config, const std::string& model_type,
                                   int num_layers) {
  if (model_type.starts_with("qwen")) return sliding_windows_of_qwen(config, num_layers);
  Index window = 0;
  if (model_type == "mistral") {
    // Absent it is 4096, null it is none.
    const bool none = config.contains("sliding_window") && config["sliding_window"].is_null();
    window = none ? 0 : whole_number_or(config, "sliding_window", 4096);
  } else {
    require_default(config, "sliding_window", nullptr);
  }
  return std::vector<Index>(static_cast<std::size_t>(num_layers), window);
}

/// One token id or a list of them; empty where there is none.
std::vector<int> token_ids(const Json& config, const char* name) {
  if (!is_given(config, name)) return {};
  std::vector<int> ids;
  for (const Json& id : config[name].is_array() ? config[name] : Json::array({config[name]})) {
    require(id.is_number_integer() && id >= 0 && id < (1 << 24), name, " is ", shown(config[name]),
            "; it must hold token ids in [0, 16777215]");
    ids.push_back(id.get<int>());
  }
  return ids;
}

void read_special_tokens(const Json& json, const std::filesystem::path& folder,
                         ModelConfig& config) {
  config.stop_tokens = token_ids(json, "eos_token_id");
  const std::filesystem::path path = folder / "generation_config.json";
  if (std::filesystem::exists(path)) {
    const Json generation = parse_json(read_json_text(path), path);
    require(generation.is_object(), path.string(), " is not a JSON object");
    if (is_given(generation, "eos_token_id"))
      config.stop_tokens = token_ids(generation, "eos_token_id");
  }
  std::vector<int> first = token_ids(json, "bos_token_id");
  if (first.empty()) first = config.stop_tokens;
  if (!first.empty() && first[0] < config.vocab_size) config.first_token = first[0];
}

void read_heads(const Json& json, ModelConfig& config) {
  config.num_q_heads = whole_number(json, "num_attention_heads");
  // Llama alone may leave it out; the others would mean a number of their own.
  config.num_kv_heads = config.model_type == "llama"
                            ? whole_number_or(json, "num_key_value_heads", config.num_q_heads)
                            : whole_number(json, "num_key_value_heads");
  require(config.num_q_heads % config.num_kv_heads == 0, "config.json: num_attention_heads ",
          config.num_q_heads, " is not a multiple of num_key_value_heads ", config.num_kv_heads);
  require(!config.qk_norm || is_given(json, "head_dim"), "config.json: head_dim is missing; ",
          config.model_type, " needs it");
  config.rope = commvq::parse_hf_rope(config.text);
  constexpr int kMaxChannels = 1 << 24;
  require(config.num_q_heads <= kMaxChannels / config.head_dim(),
          "config.json: ", config.num_q_heads, " heads of ", config.head_dim(), " are more than ",
          kMaxChannels, " channels");
}

}  // namespace

ModelConfig load_model_config(const std::filesystem::path& folder) {
  ModelConfig config;
  config.text = read_json_text(folder / "config.json");
  const Json json = parse_json(config.text, folder / "config.json");
  require(json.is_object(), (folder / "config.json").string(), " is not a JSON object");
  const Family& family = family_of(json);
  config.model_type = family.model_type;
  config.qkv_bias = family.qkv_bias;
  config.qk_norm = family.qk_norm;
  require_default(json, "hidden_act", "silu");
  require_default(json, "attention_bias", false);
  require_default(json, "mlp_bias", false);
  require_default(json, "pretraining_tp", 1);
  require_default(json, "quantization_config", nullptr);

  config.hidden_size = whole_number(json, "hidden_size");
  config.intermediate_size = whole_number(json, "intermediate_size");
  config.num_layers = whole_number(json, "num_hidden_layers");
  config.vocab_size = whole_number(json, "vocab_size");
  config.max_positions = whole_number(json, "max_position_embeddings");
  read_heads(json, config);
  if (json.contains("rms_norm_eps")) {
    const Json& eps = json["rms_norm_eps"];
    require(eps.is_number() && eps >= 0 && eps <= 1, "config.json: rms_norm_eps is ", shown(eps),
            "; it must be a number in [0, 1]");
    config.rms_norm_eps = eps.get<float>();
  }
  config.tied_embeddings = flag(json, "tie_word_embeddings");
  config.sliding_windows = sliding_windows(json, config.model_type, config.num_layers);
  read_special_tokens(json, folder, config);
  return config;
}

}  // namespace engine
