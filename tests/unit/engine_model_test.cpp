#include <functional>
#include <random>

#include "commvq/core/float16.hpp"
#include "commvq/io/safetensors.hpp"

#include <gmock/gmock.h>
#include <nlohmann/json.hpp>

#include "engine/model.hpp"
#include "reference/example_data.hpp"
#include "reference/llama_reference.hpp"

namespace engine {
namespace {

using commvq::Dtype;
using commvq::reference::Weights;
using commvq::testing_support::read_file;
using commvq::testing_support::small_model;
using commvq::testing_support::TemporaryFolder;
using commvq::testing_support::write_file;
using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

json tiny_config() {
  return {{"model_type", "llama"},
          {"hidden_size", 24},
          {"intermediate_size", 40},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"head_dim", 8},
          {"vocab_size", 50},
          {"max_position_embeddings", 512},
          {"rms_norm_eps", 1e-5},
          {"tie_word_embeddings", false},
          {"rope_theta", 10000.0}};
}

/// What `load_model_config` says of a changed configuration; "(no error)" if it accepts it.
std::string config_error(const std::function<void(json&)>& change) {
  const TemporaryFolder folder("model_config");
  json config = tiny_config();
  change(config);
  write_file(folder.path() / "config.json", config.dump());
  try {
    load_model_config(folder.path());
    return "(no error)";
  } catch (const commvq::Error& error) {
    return error.what();
  }
}

std::map<std::string, std::vector<Index>> shapes_of(const ModelConfig& config) {
  const Index hidden = config.hidden_size, inner = config.intermediate_size;
  std::map<std::string, std::vector<Index>> shapes = {
      {"model.embed_tokens.weight", {config.vocab_size, hidden}}, {"model.norm.weight", {hidden}}};
  if (!config.tied_embeddings) shapes["lm_head.weight"] = {config.vocab_size, hidden};
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    for (const char* norm : {"input_layernorm.weight", "post_attention_layernorm.weight"})
      shapes[prefix + norm] = {hidden};
    shapes[prefix + "self_attn.q_proj.weight"] = {config.q_size(), hidden};
    for (const char* name : {"self_attn.k_proj.weight", "self_attn.v_proj.weight"})
      shapes[prefix + name] = {config.kv_size(), hidden};
    shapes[prefix + "self_attn.o_proj.weight"] = {hidden, config.q_size()};
    for (const char* name : {"mlp.gate_proj.weight", "mlp.up_proj.weight"})
      shapes[prefix + name] = {inner, hidden};
    shapes[prefix + "mlp.down_proj.weight"] = {hidden, inner};
  }
  return shapes;
}

/// Random weights in a folder of their own, as `dtype`.
class TinyModel {
 public:
  explicit TinyModel(const json& config, Dtype dtype = Dtype::kF32) : folder_("model") {
    write_file(folder_.path() / "config.json", config.dump());
    std::mt19937_64 random(3);
    std::normal_distribution<float> normal;
    for (const auto& [name, shape] : shapes_of(load_model_config(folder_.path()))) {
      const bool is_norm = shape.size() == 1;
      const Index count = shape[0] * (is_norm ? 1 : shape[1]);
      std::vector<float> values(static_cast<std::size_t>(count));
      const float deviation = is_norm ? 0.1f : 1.0f / std::sqrt(static_cast<float>(shape.back()));
      for (float& value : values) value = (is_norm ? 1.0f : 0.0f) + deviation * normal(random);
      add(name, shape, values, dtype);
    }
    writer_.write(folder_.path() / "model.safetensors");
  }

  const std::filesystem::path& path() const { return folder_.path(); }
  const Weights& weights() const { return weights_; }

 private:
  void add(const std::string& name, const std::vector<Index>& shape, std::vector<float>& values,
           Dtype dtype) {
    std::vector<std::uint16_t> halves;
    for (float& value : values) {
      if (dtype == Dtype::kF32) break;
      const bool bf16 = dtype == Dtype::kBf16;
      halves.push_back(bf16 ? commvq::to_bf16(value) : commvq::to_fp16(value));
      value = bf16 ? commvq::from_bf16(halves.back()) : commvq::from_fp16(halves.back());
    }
    if (dtype == Dtype::kF32) {
      writer_.add(name, shape, values);
    } else {
      writer_.add(name, dtype, shape,
                  {reinterpret_cast<const std::uint8_t*>(halves.data()), 2 * halves.size()});
    }
    weights_[name] = values;
  }

  TemporaryFolder folder_;
  commvq::SafetensorsWriter writer_;
  Weights weights_;
};

std::vector<int> random_tokens(int count, int vocab_size) {
  std::mt19937_64 random(4);
  std::vector<int> tokens;
  for (int i = 0; i < count; ++i)
    tokens.push_back(static_cast<int>(random() % static_cast<std::uint64_t>(vocab_size)));
  return tokens;
}

struct Variant {
  const char* name;
  std::function<void(json&)> change;
  Dtype dtype;
};

class ModelVariants : public testing::TestWithParam<Variant> {};

TEST_P(ModelVariants, LogitsEqualTheReferences) {
  json config = tiny_config();
  GetParam().change(config);
  const TinyModel files(config, GetParam().dtype);
  const Model model(files.path());
  const std::vector<int> tokens = random_tokens(300, model.config().vocab_size);
  const auto expected = commvq::reference::llama_logits(model.config(), files.weights(), tokens);

  commvq::Cache cache = model.make_cache({}, 128, 0, commvq::FloatType::kFp32);
  const std::vector<float> logits = model.prefill(tokens, cache, Logits::kAll);
  ASSERT_EQ(static_cast<Index>(logits.size()), expected.size());
  for (Index t = 0; t < expected.rows(); ++t)
    for (Index v = 0; v < expected.cols(); ++v)
      ASSERT_NEAR(logits[static_cast<std::size_t>(t * expected.cols() + v)], expected(t, v), 2e-4)
          << "token " << t << ", logit " << v;
}

INSTANTIATE_TEST_SUITE_P(
    Variants, ModelVariants,
    testing::Values(
        Variant{"grouped", [](json&) {}, Dtype::kF32},
        Variant{"tied", [](json& c) { c["tie_word_embeddings"] = true; }, Dtype::kF32},
        Variant{"multi_head", [](json& c) { c.erase("num_key_value_heads"); }, Dtype::kF32},
        Variant{"multi_query", [](json& c) { c["num_key_value_heads"] = 1; }, Dtype::kF32},
        Variant{"derived_head_dim", [](json& c) { c.erase("head_dim"), c["hidden_size"] = 32; },
                Dtype::kF32},
        Variant{"bf16", [](json&) {}, Dtype::kBf16}, Variant{"fp16", [](json&) {}, Dtype::kF16}),
    [](const auto& variant) { return variant.param.name; });

TEST(Model, SegmentsSideBySideEqualEachAlone) {
  const TinyModel files(tiny_config());
  const Model model(files.path());
  const std::vector<int> tokens = random_tokens(30, 50);
  const std::span<const int> all(tokens);
  std::vector<commvq::Cache> caches(2, model.make_cache({}));
  const Segment segments[] = {{all.first(10), &caches[0]}, {all.subspan(10), &caches[1]}};
  const std::vector<float> together = model.forward(segments, Logits::kLastOfSegment);
  ASSERT_EQ(together.size(), 100u);
  for (const std::size_t s : {0, 1}) {
    commvq::Cache cache = model.make_cache({});
    const auto alone = model.prefill(segments[s].tokens, cache, Logits::kLastOfSegment);
    for (std::size_t v = 0; v < 50; ++v) EXPECT_NEAR(together[50 * s + v], alone[v], 1e-4);
  }
}

TEST(Model, RefusesTokensOutsideTheVocabularyAndEmptySegments) {
  const TinyModel files(tiny_config());
  const Model model(files.path());
  commvq::Cache cache = model.make_cache({});
  const auto error_of = [&](std::vector<int> tokens) -> std::string {
    const Segment segment{tokens, &cache};
    try {
      model.forward({&segment, 1}, Logits::kNone);
    } catch (const commvq::Error& error) {
      return error.what();
    }
    return "(no error)";
  };
  EXPECT_THAT(error_of({1, 50}), AllOf(HasSubstr("50"), HasSubstr("vocabulary")));
  EXPECT_THAT(error_of({-1}), HasSubstr("-1"));
  EXPECT_THAT(error_of({}), HasSubstr("no tokens"));
  EXPECT_EQ(cache.length(), 0);
}

TEST(Model, DigestNamesTheConfigurationAndTheProjections) {
  json other_theta = tiny_config();
  other_theta["rope_theta"] = 20000.0;
  const TinyModel one(tiny_config()), two(other_theta), bf16(tiny_config(), Dtype::kBf16);
  EXPECT_EQ(Model(one.path()).digest(), Model(one.path()).digest());
  EXPECT_NE(Model(one.path()).digest(), Model(two.path()).digest());
  EXPECT_NE(Model(one.path()).digest(), Model(bf16.path()).digest());
}

TEST(Model, RefusesMissingAndMisshapenWeights) {
  const TinyModel files(tiny_config());
  json config = tiny_config();
  const auto error_of = [&]() -> std::string {
    write_file(files.path() / "config.json", config.dump());
    try {
      const Model model(files.path());
    } catch (const commvq::Error& error) {
      return error.what();
    }
    return "(no error)";
  };
  EXPECT_EQ(error_of(), "(no error)");
  config["num_hidden_layers"] = 3;
  EXPECT_THAT(error_of(), HasSubstr("model.layers.2."));
  config = tiny_config();
  config["vocab_size"] = 51;
  EXPECT_THAT(error_of(), AllOf(HasSubstr("model.embed_tokens.weight"), HasSubstr("51")));
  config = tiny_config();
  std::filesystem::resize_file(files.path() / "model.safetensors", 1000);
  EXPECT_THAT(error_of(), HasSubstr("model.safetensors"));
  std::filesystem::remove(files.path() / "model.safetensors");
  EXPECT_THAT(error_of(), HasSubstr("model.safetensors"));
}

TEST(Model, CodecsMustBeOneALayer) {
  const TinyModel files(tiny_config());
  const Model model(files.path());
  EXPECT_THROW(model.make_cache(std::vector<commvq::LayerCodec>(3)), commvq::Error);
}

TEST(ModelConfig, ReadsTheShippedModel) {
  const ModelConfig config = load_model_config(small_model());
  EXPECT_EQ(config.num_layers, 6);
  EXPECT_EQ(config.num_q_heads, 4);
  EXPECT_EQ(config.num_kv_heads, 2);
  EXPECT_EQ(config.head_dim(), 128);
  EXPECT_EQ(config.vocab_size, 8192);
  EXPECT_TRUE(config.tied_embeddings);
  EXPECT_EQ(config.rope.theta, 10000.0);
}

TEST(ModelConfig, RefusesOtherArchitecturesAndOptions) {
  EXPECT_EQ(config_error([](json&) {}), "(no error)");
  EXPECT_THAT(config_error([](json& c) { c["model_type"] = "mixtral"; }), HasSubstr("\"mixtral\""));
  EXPECT_THAT(config_error([](json& c) { c.erase("model_type"); }), HasSubstr("model_type"));
  EXPECT_THAT(config_error([](json& c) { c["hidden_act"] = "gelu"; }), HasSubstr("\"gelu\""));
  for (const char* name : {"attention_bias", "mlp_bias"})
    EXPECT_THAT(config_error([&](json& c) { c[name] = true; }),
                AllOf(HasSubstr(name), HasSubstr("true")));
  EXPECT_THAT(config_error([](json& c) { c["pretraining_tp"] = 2; }), HasSubstr("pretraining_tp"));
}

TEST(ModelConfig, RefusesUnknownRopeTypesNamingThem) {
  for (const char* type : {"yarn", "longrope", "dynamic"})
    EXPECT_THAT(config_error([&](json& c) {
                  c["rope_scaling"] = {{"rope_type", type}, {"factor", 2.0}};
                }),
                HasSubstr(type));
}

TEST(ModelConfig, RefusesFieldsThatAreMissingOrOutOfRange) {
  for (const char* name : {"hidden_size", "intermediate_size", "num_hidden_layers",
                           "num_attention_heads", "vocab_size", "max_position_embeddings"}) {
    EXPECT_THAT(config_error([&](json& c) { c.erase(name); }),
                AllOf(HasSubstr(name), HasSubstr("missing")));
    for (const json& value : {json(0), json(-5), json(1 << 30), json("many"), json(2.5)})
      EXPECT_THAT(config_error([&](json& c) { c[name] = value; }),
                  AllOf(HasSubstr(name), HasSubstr(value.dump())));
  }
  EXPECT_THAT(config_error([](json& c) { c["num_key_value_heads"] = 3; }),
              AllOf(HasSubstr("num_attention_heads 4"), HasSubstr("num_key_value_heads 3")));
  EXPECT_THAT(config_error([](json& c) { c["hidden_size"] = ~std::uint64_t{0}; }),
              HasSubstr("hidden_size is 18446744073709551615"));
  EXPECT_THAT(config_error([](json& c) { c["rms_norm_eps"] = "small"; }), HasSubstr("\"small\""));
  for (const json& value : {json(-1e-5), json(1e300), json(2)})
    EXPECT_THAT(config_error([&](json& c) { c["rms_norm_eps"] = value; }),
                HasSubstr("rms_norm_eps is " + value.dump()));
  EXPECT_THAT(config_error([](json& c) { c["tie_word_embeddings"] = 1; }),
              HasSubstr("tie_word_embeddings is 1"));
  EXPECT_THAT(config_error([](json& c) { c["head_dim"] = 7; }), HasSubstr("7"));
  EXPECT_THAT(config_error([](json& c) { c = json::array(); }), HasSubstr("not a JSON object"));
}

// Their product, as an int, would overflow.
TEST(ModelConfig, RefusesMoreChannelsThanAnyModelHas) {
  EXPECT_THAT(config_error([](json& c) {
                c["num_attention_heads"] = c["num_key_value_heads"] = 1 << 24;
                c["head_dim"] = 1024;
              }),
              HasSubstr("16777216 heads of 1024"));
}

TEST(ModelConfig, RefusesDeepNestingAndQuotesShort) {
  const TemporaryFolder folder("model_config");
  const auto error_of = [&](const std::string& text) -> std::string {
    write_file(folder.path() / "config.json", text);
    try {
      load_model_config(folder.path());
      return "(no error)";
    } catch (const commvq::Error& error) {
      return error.what();
    }
  };
  EXPECT_THAT(error_of(R"({"model_type":)" + std::string(100000, '[')),
              HasSubstr("nested deeper than 64"));
  const std::string shown = error_of(R"({"model_type":")" + std::string(100000, 'x') + "\"}");
  EXPECT_THAT(shown, HasSubstr("model_type is \"xxx"));
  EXPECT_LT(shown.size(), 400u);
  EXPECT_THAT(error_of(R"({"model_type":1e999})"), HasSubstr("JSON cannot be read"));
  EXPECT_THAT(error_of("{"), HasSubstr("not valid JSON at byte 2"));
}

TEST(ModelConfig, RefusesAFileTooLargeForIt) {
  const TemporaryFolder folder("model_config");
  write_file(folder.path() / "config.json", "{}");
  std::filesystem::resize_file(folder.path() / "config.json", 100'000'001);
  EXPECT_THAT([&] { load_model_config(folder.path()); },
              testing::ThrowsMessage<commvq::Error>(HasSubstr("the limit is 100000000")));
}

}  // namespace
}  // namespace engine
