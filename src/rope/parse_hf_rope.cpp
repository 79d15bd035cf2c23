#include <cmath>
#include <string>

#include "commvq/rope/rope.hpp"

#include <nlohmann/json.hpp>

#include "io/strict_json.hpp"

namespace commvq {
namespace {

using Json = nlohmann::json;
using detail::in_quotes;

/// Configurations of models that see and hear nest a few levels.
constexpr int kMaxDepth = 64;

double number(const Json& object, const char* name) {
  require(object.contains(name), "the model's config has no ", name);
  require(object[name].is_number(), "the model's config has ", name, " = ",
          in_quotes(object[name].dump()), "; it must be a number");
  return object[name].get<double>();
}

double number_or(const Json& object, const char* name, double otherwise) {
  return object.contains(name) && !object[name].is_null() ? number(object, name) : otherwise;
}

/// A whole number in [1, 2^20], to which every dimension of a head must belong.
int dimension(double value, const char* name) {
  require(value >= 1 && value <= (1 << 20) && value == std::floor(value), "the model's config has ",
          name, " = ", value, "; it must be a whole number in [1, 1048576]");
  return static_cast<int>(value);
}

int head_dim_of(const Json& config) {
  if (config.contains("head_dim") && !config["head_dim"].is_null())
    return dimension(number(config, "head_dim"), "head_dim");
  const int hidden = dimension(number(config, "hidden_size"), "hidden_size");
  const int heads = dimension(number(config, "num_attention_heads"), "num_attention_heads");
  require(hidden % heads == 0, "the model's config has hidden_size = ", hidden,
          ", not a multiple of num_attention_heads = ", heads);
  return hidden / heads;
}

/// The object that describes the scaling: `rope_scaling`, or the newer `rope_parameters`.
Json scaling_of(const Json& config) {
  for (const char* name : {"rope_parameters", "rope_scaling"})
    if (config.contains(name) && !config[name].is_null()) {
      require(config[name].is_object(), "the model's config has ", name, " = ",
              in_quotes(config[name].dump()), "; it must be an object");
      return config[name];
    }
  return Json::object();
}

std::string type_of(const Json& scaling) {
  for (const char* name : {"rope_type", "type"})
    if (scaling.contains(name)) {
      require(scaling[name].is_string(), "the model's config has ", name, " = ",
              in_quotes(scaling[name].dump()), "; it must be a string");
      return scaling[name].get<std::string>();
    }
  return "default";
}

void read_scaling(const Json& scaling, RopeConfig& rope) {
  const std::string type = type_of(scaling);
  if (type == "default") return;
  require(type == "linear" || type == "llama3", "RoPE type ", in_quotes(type),
          " is not supported; known are default, linear and llama3");
  rope.factor = number(scaling, "factor");
  rope.scaling = RopeScaling::kLinear;
  if (type == "linear") return;
  rope.scaling = RopeScaling::kLlama3;
  rope.low_freq_factor = number(scaling, "low_freq_factor");
  rope.high_freq_factor = number(scaling, "high_freq_factor");
  rope.original_max_position = number(scaling, "original_max_position_embeddings");
}

}  // namespace

RopeConfig parse_hf_rope(const std::string& config_json, RopeLayout layout) {
  const Json config = detail::parse_strict_json(config_json, kMaxDepth, "the model's config");
  require(config.is_object(), "the model's config is not a JSON object");
  const Json scaling = scaling_of(config);
  RopeConfig rope;
  rope.pairs.layout = layout;
  rope.pairs.head_dim = head_dim_of(config);
  const double partial =
      number_or(config, "partial_rotary_factor", number_or(scaling, "partial_rotary_factor", 1.0));
  require(partial > 0 && partial <= 1, "partial_rotary_factor is ", partial,
          "; it must be in (0, 1]");
  rope.pairs.rotary_dim = static_cast<int>(rope.pairs.head_dim * partial);
  rope.theta = number_or(config, "rope_theta", number_or(scaling, "rope_theta", 10000.0));
  read_scaling(scaling, rope);
  rope.validate();
  return rope;
}

}  // namespace commvq
