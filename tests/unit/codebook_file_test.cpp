#include "commvq/io/codebook_file.hpp"

#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <random>
#include <tuple>

#include "commvq/io/safetensors.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

namespace commvq {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int kHeads = 2;
constexpr int kHeadDim = 8;

std::vector<float> random_floats(std::size_t count, std::mt19937_64& random) {
  std::vector<float> floats(count);
  for (float& value : floats) value = static_cast<float>(random() >> 40) * 0x1p-23f - 1.0f;
  return floats;
}

std::shared_ptr<const KeyCodec> random_keys(const PairLayout& pairs, bool tied,
                                            std::mt19937_64& random) {
  KeyCodecConfig config;
  config.pairs = pairs;
  config.group_pairs = 2;
  config.codebook_size = 4;
  config.num_stages = 3;
  config.tied = tied;
  config.beam_width = 2;
  config.norm_per_head = !tied;
  std::vector<KeyCodebook<float>> heads;
  for (int head = 0; head < kHeads; ++head) {
    KeyCodebook<float> codebook(config);
    codebook.rows = random_floats(codebook.rows.size(), random);
    if (tied) codebook.derive_tied_books();
    if (!tied) {
      codebook.pair_weights = random_floats(kHeadDim / 2, random);
      for (float& weight : codebook.pair_weights) weight += 2.0f;
    }
    heads.push_back(codebook);
  }
  return std::make_shared<const KeyCodec>(heads);
}

std::shared_ptr<const ValueCodec> random_values(int bits, std::mt19937_64& random,
                                                int num_blocks = 1, bool graded = false) {
  const ValueCodecConfig config{kHeads * kHeadDim, bits, 3, 2 * (bits - 1), num_blocks, graded};
  const auto C = static_cast<std::size_t>(config.num_channels);
  const auto L = static_cast<std::size_t>(config.num_logits());
  ValueCodecWeights weights;
  weights.norm_gain = random_floats(C, random);
  weights.norm_bias = random_floats(C, random);
  weights.hidden_weight = random_floats(3 * C, random);
  weights.hidden_bias = random_floats(3 * static_cast<std::size_t>(num_blocks), random);
  weights.output_weight = random_floats(3 * L, random);
  weights.output_bias = random_floats(L, random);
  weights.decoder = random_floats(
      static_cast<std::size_t>(config.num_code_bits()) * C / static_cast<std::size_t>(num_blocks),
      random);
  if (graded) weights.derive_graded_rows(config.block().num_channels);
  if (bits == 2) {
    weights.channel_scales = random_floats(C, random);
    for (float& scale : weights.channel_scales) scale += 2.0f;
  }
  return std::make_shared<const ValueCodec>(config, weights);
}

/// Layers with both codecs, one or none; tied and untied keys, 1-bit and 2-bit values.
ModelCodecs example_codecs() {
  std::mt19937_64 random(3);
  ModelCodecs codecs;
  codecs.rope.pairs = {kHeadDim, 6, RopeLayout::kInterleaved};
  codecs.rope.theta = 500000.1;
  codecs.rope.scaling = RopeScaling::kLlama3;
  codecs.rope.factor = 8.3;
  codecs.num_kv_heads = kHeads;
  codecs.model_digest = "digest-1";
  codecs.provenance = "a \"test\"";
  const PairLayout& pairs = codecs.rope.pairs;
  codecs.layers = {{random_keys(pairs, true, random), random_values(1, random)},
                   {random_keys(pairs, false, random), nullptr},
                   {nullptr, random_values(2, random)},
                   {nullptr, nullptr}};
  return codecs;
}

void expect_equal(const ModelCodecs& a, const ModelCodecs& b) {
  EXPECT_EQ(a.rope, b.rope);
  EXPECT_EQ(a.num_kv_heads, b.num_kv_heads);
  EXPECT_EQ(a.model_digest, b.model_digest);
  EXPECT_EQ(a.provenance, b.provenance);
  ASSERT_EQ(a.layers.size(), b.layers.size());
  for (std::size_t i = 0; i < a.layers.size(); ++i) {
    ASSERT_EQ(a.layers[i].keys == nullptr, b.layers[i].keys == nullptr);
    ASSERT_EQ(a.layers[i].values == nullptr, b.layers[i].values == nullptr);
    if (const auto& keys = a.layers[i].keys) {
      EXPECT_EQ(keys->config(), b.layers[i].keys->config());
      for (int head = 0; head < kHeads; ++head) {
        EXPECT_EQ(keys->codebook(head).rows, b.layers[i].keys->codebook(head).rows);
        EXPECT_EQ(keys->codebook(head).pair_weights, b.layers[i].keys->codebook(head).pair_weights);
      }
    }
    if (const auto& values = a.layers[i].values) {
      const ValueCodecWeights& x = values->weights();
      const ValueCodecWeights& y = b.layers[i].values->weights();
      EXPECT_EQ(values->config(), b.layers[i].values->config());
      EXPECT_EQ(x.norm_gain, y.norm_gain);
      EXPECT_EQ(x.norm_bias, y.norm_bias);
      EXPECT_EQ(x.hidden_weight, y.hidden_weight);
      EXPECT_EQ(x.hidden_bias, y.hidden_bias);
      EXPECT_EQ(x.output_weight, y.output_weight);
      EXPECT_EQ(x.output_bias, y.output_bias);
      EXPECT_EQ(x.decoder, y.decoder);
      EXPECT_EQ(x.channel_scales, y.channel_scales);
    }
  }
}

std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "(no error)";
}

/// A codebook file in a folder of the test's own, and ways to falsify it.
class CodebookFileTest : public ::testing::Test {
 protected:
  CodebookFileTest()
      : folder_(fs::temp_directory_path() / ("commvq_codebooks_" + std::to_string(getpid()))) {
    fs::remove_all(folder_);
    fs::create_directory(folder_);
    save_codecs(path_ = folder_ / "good.safetensors", example_codecs());
  }
  ~CodebookFileTest() override { fs::remove_all(folder_); }

  using Metadata = std::map<std::string, std::string>;
  using EditTensor = std::function<bool(TensorView&)>;  ///< false drops the tensor

  /// The message for the good file after these edits.
  std::string error_after(const std::function<void(Metadata&)>& edit_metadata,
                          const EditTensor& edit_tensor = nullptr) const {
    const SafetensorsFile good(path_);
    Metadata metadata = good.metadata();
    if (edit_metadata) edit_metadata(metadata);
    SafetensorsWriter writer;
    for (const auto& [key, value] : metadata) writer.set_metadata(key, value);
    for (auto [name, tensor] : good.tensors())
      if (!edit_tensor || edit_tensor(tensor))
        writer.add(tensor.name, tensor.dtype, tensor.shape, tensor.data);
    writer.write(folder_ / "bad.safetensors");
    return error_of([&] { load_codecs(folder_ / "bad.safetensors"); });
  }

  std::string error_after_config(const std::string& pointer, const json& value) const {
    return error_after([&](Metadata& metadata) {
      json config = json::parse(metadata.at("config"));
      config[json::json_pointer(pointer)] = value;
      metadata["config"] = config.dump();
    });
  }

  fs::path folder_;
  fs::path path_;
};

TEST_F(CodebookFileTest, RoundTripsExactly) {
  expect_equal(example_codecs(), load_codecs(path_));
}

TEST_F(CodebookFileTest, StoresTheDocumentedTensors) {
  const SafetensorsFile file(path_);
  EXPECT_EQ(file.metadata().at("format"), "commvq.codecs");
  EXPECT_EQ(file.metadata().at("version"), "1");
  EXPECT_THAT(file.at("layers.0.keys.codebooks").shape, ElementsAre(kHeads, 2, 3, 1, 4, 4));
  EXPECT_THAT(file.at("layers.1.keys.codebooks").shape, ElementsAre(kHeads, 2, 3, 2, 4, 4));
  EXPECT_THAT(file.at("layers.0.values.decoder").shape, ElementsAre(16, 16));
  EXPECT_THAT(file.at("layers.2.values.decoder").shape, ElementsAre(32, 16));
  EXPECT_THAT(file.at("layers.2.values.output_weight").shape, ElementsAre(64, 3));
  EXPECT_FALSE(file.contains("layers.0.keys.pair_weights"));
  EXPECT_THAT(file.at("layers.1.keys.pair_weights").shape, ElementsAre(kHeads, 4));
  EXPECT_FALSE(file.contains("layers.0.values.channel_scales"));
  EXPECT_THAT(file.at("layers.2.values.channel_scales").shape, ElementsAre(16));
  EXPECT_EQ(file.tensors().size(), 3u + 2u * 7u + 1u);
}

TEST_F(CodebookFileTest, RoundTripsBlocksOfValues) {
  std::mt19937_64 random(4);
  ModelCodecs codecs = example_codecs();
  codecs.layers = {{nullptr, random_values(2, random, kHeads)}};
  save_codecs(path_, codecs);
  expect_equal(codecs, load_codecs(path_));
  const SafetensorsFile file(path_);
  EXPECT_THAT(file.at("layers.0.values.norm_gain").shape, ElementsAre(16));
  EXPECT_THAT(file.at("layers.0.values.hidden_weight").shape, ElementsAre(kHeads * 3, 8));
  EXPECT_THAT(file.at("layers.0.values.hidden_bias").shape, ElementsAre(kHeads * 3));
  EXPECT_THAT(file.at("layers.0.values.output_weight").shape, ElementsAre(64, 3));
  EXPECT_THAT(file.at("layers.0.values.decoder").shape, ElementsAre(32, 8));
  EXPECT_THAT(error_after_config("/layers/0/values/num_blocks", 3), HasSubstr("num_blocks is 3"));
  EXPECT_THAT(error_after_config("/layers/0/values/num_blocks", 1), HasSubstr("hidden_weight"));
}

// So that such files are those of earlier versions of the library.
TEST_F(CodebookFileTest, DoesNotMentionASingleBlockAndCodesThatAreNotGraded) {
  const SafetensorsFile file(path_);
  EXPECT_THAT(file.metadata().at("config"),
              testing::Not(testing::AnyOf(HasSubstr("num_blocks"), HasSubstr("graded"))));
}

TEST_F(CodebookFileTest, RoundTripsGradedKeys) {
  std::mt19937_64 random(6);
  ModelCodecs codecs = example_codecs();
  KeyCodecConfig config = KeyCodecConfig::speed_1bit(codecs.rope.pairs);
  config.num_stages = 8;
  config.graded = true;
  std::vector<KeyCodebook<float>> heads;
  for (int head = 0; head < kHeads; ++head) {
    KeyCodebook<float>& codebook = heads.emplace_back(config);
    codebook.rows = random_floats(codebook.rows.size(), random);
    codebook.derive_graded_rows();
  }
  codecs.layers = {{std::make_shared<const KeyCodec>(heads), nullptr}};
  save_codecs(path_, codecs);
  expect_equal(codecs, load_codecs(path_));
  EXPECT_THAT(error_after_config("/layers/0/keys/graded", 1), HasSubstr("true or false"));
  EXPECT_THAT(error_after_config("/layers/0/keys/num_stages", 6), HasSubstr("num_stages is 6"));
  std::vector<float> rows = heads[0].rows;
  rows.insert(rows.end(), heads[1].rows.begin(), heads[1].rows.end());
  rows[heads[0].rows.size() + kHeadDim] += 0.5f;
  EXPECT_THAT(error_after(nullptr,
                          [&](TensorView& tensor) {
                            tensor.data = {reinterpret_cast<const unsigned char*>(rows.data()),
                                           rows.size() * sizeof(float)};
                            return true;
                          }),
              HasSubstr("head 1 is not graded"));
}

TEST_F(CodebookFileTest, RoundTripsGradedValues) {
  std::mt19937_64 random(7);
  ModelCodecs codecs = example_codecs();
  codecs.layers = {{nullptr, random_values(2, random, kHeads, true)}};
  save_codecs(path_, codecs);
  expect_equal(codecs, load_codecs(path_));
  EXPECT_THAT(error_after_config("/layers/0/values/graded", 1), HasSubstr("true or false"));
  std::vector<float> rows = codecs.layers[0].values->weights().decoder;
  rows[16 * kHeadDim + 3] += 0.5f;
  EXPECT_THAT(error_after(nullptr,
                          [&](TensorView& tensor) {
                            if (tensor.name == "layers.0.values.decoder")
                              tensor.data = {reinterpret_cast<const unsigned char*>(rows.data()),
                                             rows.size() * sizeof(float)};
                            return true;
                          }),
              HasSubstr("not graded: in block 1, channel 3"));
}

TEST_F(CodebookFileTest, RefusesBlocksThatCutHeads) {
  std::mt19937_64 random(4);
  ModelCodecs codecs = example_codecs();
  codecs.num_kv_heads = 1;
  codecs.rope.pairs = {kHeads * kHeadDim, 6, RopeLayout::kInterleaved};
  codecs.layers = {{nullptr, random_values(1, random, 2)}};
  EXPECT_THAT(error_of([&] { save_codecs(path_, codecs); }),
              testing::AllOf(HasSubstr("layer 0 has num_blocks 2"), HasSubstr("1 KV heads")));
}

TEST_F(CodebookFileTest, UneditedCopyLoads) {
  EXPECT_EQ(error_after(nullptr), "(no error)");
}

TEST_F(CodebookFileTest, RefusesOtherFormatsAndVersionsNamingBoth) {
  const std::string version = error_after([](Metadata& m) { m["version"] = "7"; });
  EXPECT_THAT(version, HasSubstr("version \"7\""));
  EXPECT_THAT(version, HasSubstr("version 1"));
  const std::string format = error_after([](Metadata& m) { m["format"] = "pt"; });
  EXPECT_THAT(format, HasSubstr("\"pt\""));
  EXPECT_THAT(format, HasSubstr("commvq.codecs"));
  for (const char* key : {"format", "version", "config"})
    EXPECT_THAT(error_after([&](Metadata& m) { m.erase(key); }), HasSubstr(key));
  EXPECT_THAT(
      error_of([] { load_codecs(fs::path(COMMVQ_EXAMPLE_DATA) / "lm-7m" / "model.safetensors"); }),
      HasSubstr("format"));
}

TEST_F(CodebookFileTest, RefusesConfigurationsOutOfRange) {
  EXPECT_THAT(error_after([](Metadata& m) { m["config"] = "{"; }), HasSubstr("not valid JSON"));
  EXPECT_THAT(error_after([](Metadata& m) { m["config"] = "[]"; }), HasSubstr("object"));
  EXPECT_THAT(error_after([](Metadata& m) { m["config"] = "{}"; }), HasSubstr("rope"));
  const std::vector<std::tuple<std::string, json, std::string>> cases = {
      {"/rope/head_dim", 7, "head_dim"},
      {"/rope/head_dim", 16, ""},
      {"/rope/rotary_dim", 1 << 20, "rotary_dim"},
      {"/rope/layout", "diagonal", "diagonal"},
      {"/rope/scaling", "yarn", "yarn"},
      {"/rope/theta", "big", "theta"},
      {"/rope/theta", -1.0, "theta"},
      {"/num_kv_heads", 0, "num_kv_heads"},
      {"/num_kv_heads", 3, "[3, "},
      {"/num_kv_heads", std::numeric_limits<std::uint64_t>::max(), "num_kv_heads"},
      {"/model_digest", 5, "model_digest"},
      {"/provenance", nullptr, "provenance"},
      {"/layers", json::array(), "layers"},
      {"/layers", 4, "layers"},
      {"/layers/0", 4, "layers[0]"},
      {"/layers/0/keys", "x", "layers[0].keys"},
      {"/layers/0/keys/group_pairs", 3, "group_pairs"},
      {"/layers/0/keys/group_pairs", 4, "shape"},
      {"/layers/0/keys/codebook_size", 128, "shape"},
      {"/layers/0/keys/codebook_size", 129, "codebook_size of layer 0 is 129"},
      {"/layers/0/keys/codebook_size", 65536, "codebook_size of layer 0 is 65536"},
      {"/layers/0/keys/codebook_size", 4.0, "codebook_size"},
      {"/layers/0/keys/num_stages", 0, "num_stages"},
      {"/layers/0/keys/num_stages", 1024, "shape"},
      {"/layers/0/keys/tied", 1, "tied"},
      {"/layers/0/keys/tied", false, "shape"},
      {"/layers/0/keys/beam_width", -1, "beam_width"},
      {"/layers/0/keys/norm_per_head", 1, "norm_per_head"},
      {"/layers/0/values/bits", 3, "bits"},
      {"/layers/0/values/polish_sweeps", 65, "polish_sweeps"},
      {"/layers/0/values/bits", 2, "shape"},
      {"/layers/0/values/num_channels", 24, "shape"},
      {"/layers/0/values/hidden_size", 4, "shape"},
      {"/layers/3/values", {{"num_channels", 16}, {"bits", 1}, {"hidden_size", 3}}, "no tensor"},
  };
  for (const auto& [pointer, value, message] : cases) {
    const std::string error = error_after_config(pointer, value);
    EXPECT_NE(error, "(no error)") << pointer << " = " << value;
    EXPECT_THAT(error, HasSubstr(message)) << pointer << " = " << value;
  }
}

TEST_F(CodebookFileTest, RefusesMissingMisshapenAndNonFiniteTensors) {
  for (const char* name : {"layers.1.keys.codebooks", "layers.2.values.decoder"}) {
    EXPECT_THAT(error_after(nullptr, [&](TensorView& t) { return t.name != name; }),
                HasSubstr(std::string("no tensor \"") + name));
    const auto flatten = [&](TensorView& t) {
      if (t.name == name) t.shape = {t.num_elements()};
      return true;
    };
    EXPECT_THAT(error_after(nullptr, flatten),
                HasSubstr(std::string("\"") + name + "\" has shape"));
    const auto as_integers = [&](TensorView& t) {
      if (t.name == name) t.dtype = Dtype::kI32;
      return true;
    };
    EXPECT_THAT(error_after(nullptr, as_integers), HasSubstr("holds I32"));
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
      std::vector<std::uint8_t> bytes;
      const auto poison = [&](TensorView& t) {
        if (t.name != name) return true;
        bytes.assign(t.data.begin(), t.data.end());
        std::memcpy(bytes.data() + bytes.size() - 4, &bad, 4);
        t.data = bytes;
        return true;
      };
      EXPECT_NE(error_after(nullptr, poison), "(no error)") << name << " with " << bad;
    }
  }
}

TEST_F(CodebookFileTest, TruncatedAndMutatedFilesAreRefusedOrRead) {
  std::ifstream stream(path_, std::ios::binary);
  const std::string whole{std::istreambuf_iterator<char>(stream), {}};
  const fs::path bad = folder_ / "bad.safetensors";
  const auto try_bytes = [&](const std::string& bytes) {
    std::ofstream(bad, std::ios::binary) << bytes;
    return error_of([&] { load_codecs(bad); });
  };
  for (std::size_t size = 0; size < whole.size(); size += 7)
    EXPECT_NE(try_bytes(whole.substr(0, size)), "(no error)") << size;
  EXPECT_NE(try_bytes(whole.substr(0, whole.size() - 1)), "(no error)");

  std::mt19937_64 random(11);
  const std::size_t config_end = whole.find("layers.0.keys.codebooks");
  ASSERT_NE(config_end, std::string::npos);
  int refused = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    std::string bytes = whole;
    bytes[8 + random() % (config_end - 8)] = static_cast<char>('0' + random() % 75);
    if (try_bytes(bytes) != "(no error)") ++refused;  // any other exception fails the test
  }
  EXPECT_GT(refused, 1000);
}

// A file of half a megabyte could otherwise ask for an encoder of 16 GiB.
TEST_F(CodebookFileTest, RefusesToWriteWhatItWouldNotRead) {
  ModelCodecs codecs = example_codecs();
  KeyCodecConfig config = codecs.layers[0].keys->config();
  config.codebook_size = 64 * config.group_pairs + 1;
  const KeyCodebook<float> zeros(config);
  codecs.layers = {{std::make_shared<const KeyCodec>(std::vector(kHeads, zeros)), nullptr}};
  EXPECT_THAT(error_of([&] { save_codecs(folder_ / "large", codecs); }),
              HasSubstr("codebook_size of layer 0 is 129"));
  EXPECT_FALSE(fs::exists(folder_ / "large"));
}

TEST_F(CodebookFileTest, QuotesStrangeTextShortAndPrintable) {
  const std::string strange = "\x1b[31m" + std::string(100000, 'x') + "\n";
  for (const char* key : {"format", "version"}) {
    const std::string error = error_after([&](Metadata& m) { m[key] = strange; });
    EXPECT_LT(error.size(), 1000u);
    EXPECT_EQ(error.find('\x1b'), std::string::npos);
  }
  const std::string layout = error_after_config("/rope/layout", strange);
  EXPECT_THAT(layout, HasSubstr("is not known"));
  EXPECT_LT(layout.size(), 1000u);
  EXPECT_LT(error_after_config("/rope/theta", strange).size(), 1000u);
}

TEST(ModelCodecs, RequireModelNamesWhatDiffers) {
  const ModelCodecs codecs = example_codecs();
  EXPECT_NO_THROW(codecs.require_model(codecs.rope, kHeads, 4, "digest-1"));
  const auto error_for = [&](const RopeConfig& rope, int heads, int layers, const char* digest) {
    return error_of([&] { codecs.require_model(rope, heads, layers, digest); });
  };
  const std::string digest = error_for(codecs.rope, kHeads, 4, "digest-2");
  EXPECT_THAT(digest, HasSubstr("digest-1"));
  EXPECT_THAT(digest, HasSubstr("digest-2"));
  EXPECT_THAT(error_for(codecs.rope, 9, 4, "digest-1"), HasSubstr("9"));
  EXPECT_THAT(error_for(codecs.rope, kHeads, 32, "digest-1"), HasSubstr("32"));
  RopeConfig rope = codecs.rope;
  rope.theta = 10000;
  EXPECT_THAT(error_for(rope, kHeads, 4, "digest-1"), HasSubstr("theta 10000"));
  rope = codecs.rope;
  rope.pairs.head_dim = 128;
  EXPECT_THAT(error_for(rope, kHeads, 4, "digest-1"), HasSubstr("128"));
}

TEST(ModelCodecs, ValidateRefusesCodecsThatDoNotFitTheModel) {
  EXPECT_NO_THROW(example_codecs().validate());
  ModelCodecs codecs = example_codecs();
  codecs.num_kv_heads = 3;
  EXPECT_THAT(error_of([&] { codecs.validate(); }), HasSubstr("the model has 3"));
  codecs = example_codecs();
  codecs.rope.pairs.layout = RopeLayout::kHalfSplit;
  EXPECT_THROW(codecs.validate(), Error);
  codecs = example_codecs();
  codecs.layers.clear();
  EXPECT_THROW(save_codecs("never_written", codecs), Error);
}

}  // namespace
}  // namespace commvq
