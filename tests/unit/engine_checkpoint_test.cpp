// Checkpoints of every model family against what the transformers and tokenizers packages compute:
// see tests/data/make_checkpoints.py.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "commvq/io/safetensors.hpp"

#include <gmock/gmock.h>
#include <nlohmann/json.hpp>

#include "engine/generate.hpp"
#include "engine/model.hpp"
#include "engine/tokenizer.hpp"
#include "reference/example_data.hpp"

namespace engine {
namespace {

using commvq::testing_support::read_file;
using commvq::testing_support::TemporaryFolder;
using commvq::testing_support::test_data;
using commvq::testing_support::write_file;
using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

std::filesystem::path folder_of(const std::string& family) {
  return test_data() / "checkpoints" / family;
}

/// The tokens of `expected.safetensors` and the logits `[tokens][vocab_size]` that belong to them.
struct Expected {
  explicit Expected(const std::string& family) {
    const commvq::SafetensorsFile file(folder_of(family) / "expected.safetensors");
    const commvq::TensorView& ids = file.at("tokens");
    for (Index i = 0; i < ids.num_elements(); ++i) {
      std::int64_t id = 0;
      std::memcpy(&id, ids.data.data() + i * 8, 8);
      tokens.push_back(static_cast<int>(id));
    }
    logits = file.at("logits").to_floats();
  }
  std::vector<int> tokens;
  std::vector<float> logits;
};

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double largest = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    largest = std::max(largest, std::abs(double(a[i]) - double(b[i])));
  return largest;
}

/// Logits of sums in another order: both sides compute in FP32, logits are of the order of 10.
constexpr double kTolerance = 1e-4;

std::vector<float> prefill_logits(const Model& model, const std::vector<int>& tokens) {
  commvq::Cache cache = model.make_cache({}, 128, 0, commvq::FloatType::kFp32);
  return model.prefill(tokens, cache, Logits::kAll);
}

class Checkpoints : public testing::TestWithParam<const char*> {};

TEST_P(Checkpoints, PrefillGivesTheLogitsOfTransformers) {
  const Model model(folder_of(GetParam()));
  const Expected expected(GetParam());
  ASSERT_EQ(expected.tokens.size(), 40u);
  const std::vector<float> logits = prefill_logits(model, expected.tokens);
  ASSERT_EQ(logits.size(), 40u * 352u);
  EXPECT_LE(largest_difference(logits, expected.logits), kTolerance);
}

TEST_P(Checkpoints, DecodingTokenByTokenGivesTheSameLogits) {
  const Model model(folder_of(GetParam()));
  const Expected expected(GetParam());
  // The second cache moves tokens to its pages while the model runs.
  for (const Index window : {128, 4}) {
    commvq::Cache cache = model.make_cache({}, window, 0, commvq::FloatType::kFp32);
    const std::span<const int> tokens(expected.tokens);
    std::vector<float> logits = model.prefill(tokens.subspan(0, 7), cache, Logits::kAll);
    for (std::size_t t = 7; t < tokens.size(); ++t) {
      const Segment segment{tokens.subspan(t, 1), &cache};
      const std::vector<float> row = model.forward({&segment, 1}, Logits::kAll);
      logits.insert(logits.end(), row.begin(), row.end());
    }
    EXPECT_LE(largest_difference(logits, expected.logits), kTolerance) << "window " << window;
  }
}

TEST_P(Checkpoints, TokenizerGivesTheIdsOfTheTokenizersPackage) {
  const Tokenizer tokenizer(folder_of(GetParam()) / "tokenizer.json");
  EXPECT_EQ(tokenizer.vocab_size(), 352);
  const json cases = json::parse(read_file(folder_of(GetParam()) / "cases.json"));
  ASSERT_EQ(cases.size(), 17u);
  for (const json& example : cases) {
    const auto text = example["text"].get<std::string>();
    const std::vector<int> ids = tokenizer.encode(text);
    EXPECT_EQ(ids, example["ids"].get<std::vector<int>>()) << text;
    EXPECT_EQ(tokenizer.encode_with_template(text),
              example["ids_with_template"].get<std::vector<int>>())
        << text;
    EXPECT_EQ(tokenizer.decode(ids), example["decoded"].get<std::string>()) << text;
  }
}

TEST_P(Checkpoints, GenerationStopsAtAnEndToken) {
  const Model model(folder_of(GetParam()));
  const Expected expected(GetParam());
  Sampler greedy{SamplerOptions{}};
  commvq::Cache cache = model.make_cache({});
  const std::vector<int> written = generate(model, cache, expected.tokens, 30, greedy);
  ASSERT_EQ(written.size(), 30u);
  cache.clear();
  const int stop = written[4];
  const auto first = std::find(written.begin(), written.end(), stop);
  EXPECT_EQ(generate(model, cache, expected.tokens, 30, greedy, {{-1, stop}}),
            std::vector<int>(written.begin(), first + 1));
}

INSTANTIATE_TEST_SUITE_P(Families, Checkpoints,
                         testing::Values("llama2", "llama3", "mistral", "qwen2", "qwen3"),
                         [](const auto& family) { return std::string(family.param); });

TEST(Metaspace, EveryVariantGivesTheIdsOfTheTokenizersPackage) {
  const json cases = json::parse(read_file(folder_of("mistral") / "cases.json"));
  const json variants = json::parse(read_file(test_data() / "checkpoints/metaspace_cases.json"));
  ASSERT_EQ(variants.size(), 4u);
  for (const json& variant : variants) {
    const TemporaryFolder folder("metaspace");
    json file = json::parse(read_file(folder_of("mistral") / "tokenizer.json"));
    file["pre_tokenizer"] = variant["pre_tokenizer"];
    write_file(folder.path() / "tokenizer.json", file.dump());
    const Tokenizer tokenizer(folder.path() / "tokenizer.json");
    ASSERT_EQ(variant["ids"].size(), cases.size());
    for (std::size_t i = 0; i < cases.size(); ++i)
      EXPECT_EQ(tokenizer.encode(cases[i]["text"].get<std::string>()),
                variant["ids"][i].get<std::vector<int>>())
          << variant["pre_tokenizer"] << " " << cases[i]["text"];
  }
}

/// A copy of a checkpoint after a change to its configuration.
class ChangedCheckpoint {
 public:
  ChangedCheckpoint(const std::string& family, const std::function<void(json&)>& change)
      : folder_("checkpoint") {
    std::filesystem::copy(folder_of(family), folder_.path());
    json config = json::parse(read_file(folder_.path() / "config.json"));
    change(config);
    write_file(folder_.path() / "config.json", config.dump());
  }
  const std::filesystem::path& path() const { return folder_.path(); }

 private:
  TemporaryFolder folder_;
};

std::string load_error(const std::string& family, const std::function<void(json&)>& change) {
  const ChangedCheckpoint changed(family, change);
  try {
    const Model model(changed.path());
    return "(no error)";
  } catch (const commvq::Error& error) {
    return error.what();
  }
}

// Without this the comparisons above might hold for a model that ignores the option.
TEST(CheckpointOptions, EachChangesTheLogits) {
  struct Option {
    const char* family;
    std::function<void(json&)> change;
  };
  const Option options[] = {{"llama2", [](json& c) { c["rope_scaling"] = nullptr; }},
                            {"llama3", [](json& c) { c["rope_scaling"]["low_freq_factor"] = 0.1; }},
                            {"llama3", [](json& c) { c["rope_scaling"]["rope_type"] = "linear"; }},
                            {"mistral", [](json& c) { c["sliding_window"] = nullptr; }},
                            {"mistral", [](json& c) { c["sliding_window"] = 13; }},
                            {"qwen2", [](json& c) { c["use_sliding_window"] = false; }},
                            {"qwen2", [](json& c) { c["layer_types"][0] = "sliding_attention"; }},
                            {"qwen3", [](json& c) { c["rms_norm_eps"] = 0.5; }}};
  for (const Option& option : options) {
    const ChangedCheckpoint changed(option.family, option.change);
    const Expected expected(option.family);
    const std::vector<float> logits = prefill_logits(Model(changed.path()), expected.tokens);
    EXPECT_GT(largest_difference(logits, expected.logits), 0.01)
        << option.family << " " << read_file(changed.path() / "config.json");
  }
}

TEST(CheckpointOptions, LayersThatSlideMayBeCountedInsteadOfNamed) {
  const ChangedCheckpoint changed("qwen2", [](json& c) { c.erase("layer_types"); });
  const Expected expected("qwen2");
  EXPECT_LE(
      largest_difference(prefill_logits(Model(changed.path()), expected.tokens), expected.logits),
      kTolerance);
}

TEST(CheckpointOptions, FirstAndLastTokensAreThoseOfTheFiles) {
  EXPECT_EQ(load_model_config(folder_of("llama3")).stop_tokens, (std::vector<int>{350, 351}));
  EXPECT_EQ(load_model_config(folder_of("llama3")).first_token, 349);
  EXPECT_EQ(load_model_config(folder_of("mistral")).stop_tokens, std::vector<int>{2});
  EXPECT_EQ(load_model_config(folder_of("mistral")).first_token, 1);
}

TEST(CheckpointOptions, TensorsWithoutAUseAreRefused) {
  EXPECT_EQ(load_error("qwen2", [](json&) {}), "(no error)");
  EXPECT_THAT(
      load_error("qwen2", [](json& c) { c["model_type"] = "llama", c.erase("sliding_window"); }),
      HasSubstr("self_attn.k_proj.bias, which this engine does not compute with"));
  EXPECT_THAT(load_error("qwen3", [](json& c) { c["model_type"] = "mistral"; }),
              HasSubstr("self_attn.k_norm.weight, which this engine does not compute with"));
  EXPECT_THAT(load_error("mistral", [](json& c) { c["model_type"] = "qwen2"; }),
              HasSubstr("self_attn.q_proj.bias"));
  EXPECT_THAT(load_error("llama3", [](json& c) { c["num_hidden_layers"] = 1; }),
              HasSubstr("model.layers.1."));
}

TEST(CheckpointOptions, OthersAreRefusedByName) {
  for (const char* type : {"mixtral", "gemma2", "qwen3_moe", "phi3"})
    EXPECT_THAT(
        load_error("mistral", [&](json& c) { c["model_type"] = type; }),
        AllOf(HasSubstr(json(type).dump()), HasSubstr("llama, mistral, qwen2, qwen3 only")));
  EXPECT_THAT(load_error("qwen3", [](json& c) { c["attention_bias"] = true; }),
              HasSubstr("attention_bias is true"));
  EXPECT_THAT(load_error("llama3",
                         [](json& c) {
                           c["quantization_config"] = {{"quant_method", "awq"}};
                         }),
              HasSubstr("awq"));
  EXPECT_THAT(load_error("qwen2",
                         [](json& c) {
                           c["rope_scaling"] = {{"rope_type", "yarn"}, {"factor", 4.0}};
                         }),
              HasSubstr("\"yarn\""));
  EXPECT_THAT(load_error("qwen2", [](json& c) { c["layer_types"][1] = "chunked_attention"; }),
              HasSubstr("\"chunked_attention\""));
  EXPECT_THAT(load_error("qwen2", [](json& c) { c["layer_types"].push_back("full_attention"); }),
              HasSubstr("must name 2 layers"));
  EXPECT_THAT(load_error("llama2", [](json& c) { c["sliding_window"] = 4096; }),
              HasSubstr("sliding_window is 4096"));
  EXPECT_THAT(load_error("qwen3", [](json& c) { c.erase("head_dim"); }),
              HasSubstr("head_dim is missing"));
  EXPECT_THAT(load_error("mistral", [](json& c) { c.erase("num_key_value_heads"); }),
              HasSubstr("num_key_value_heads is missing"));
  EXPECT_THAT(load_error("mistral", [](json& c) { c["eos_token_id"] = "</s>"; }),
              HasSubstr("eos_token_id"));
}

}  // namespace
}  // namespace engine
