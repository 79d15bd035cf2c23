#include "commvq/c_api.h"

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "commvq/attention/attention.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include "c_api/guard.hpp"
#include "reference/instrumented.hpp"
#include "reference/random_cache.hpp"

namespace commvq {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;
using testing_support::normal_floats;
using testing_support::random_key_codec;
using testing_support::random_value_codec;
using testing_support::Rng;

constexpr int kHeads = 2, kLayers = 2;
constexpr Index kHeadDim = 32, kChannels = kHeads * kHeadDim, kQueryChannels = 2 * kChannels;

ModelCodecs example_codecs() {
  Rng rng(1);
  ModelCodecs codecs;
  codecs.rope.pairs.head_dim = codecs.rope.pairs.rotary_dim = kHeadDim;
  codecs.rope.theta = 500000;
  codecs.rope.scaling = RopeScaling::kLlama3;
  codecs.rope.factor = 8;
  codecs.num_kv_heads = kHeads;
  codecs.model_digest = "digest-1";
  for (int layer = 0; layer < kLayers; ++layer)
    codecs.layers.push_back(
        {random_key_codec(rng, KeyCodecConfig::paper_1bit(codecs.rope.pairs), kHeads),
         random_value_codec(rng, kChannels, 1, 16)});
  return codecs;
}

commvq_const_matrix rows_of(const std::vector<float>& values, Index cols) {
  return {values.data(), static_cast<Index>(values.size()) / cols, cols, cols};
}
commvq_matrix rows_of(std::vector<float>& values, Index cols) {
  return {values.data(), static_cast<Index>(values.size()) / cols, cols, cols};
}

/// Expects a status and, for failures, a message that names what was wrong.
void expect_status(commvq_status found, commvq_status expected, const char* part = "") {
  EXPECT_STREQ(commvq_status_name(found), commvq_status_name(expected)) << commvq_last_error();
  if (expected != COMMVQ_OK) {
    EXPECT_THAT(commvq_last_error(), HasSubstr(part));
  }
}

class CApiTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("commvq_c_api_" + std::to_string(getpid()));
    fs::create_directories(folder_);
    path_ = folder_ / "codecs.safetensors";
    save_codecs(path_, example_codecs());
    ASSERT_EQ(commvq_codecs_load(path_.c_str(), &codecs_), COMMVQ_OK) << commvq_last_error();
    ASSERT_EQ(commvq_cache_options_init(&options_, sizeof options_), COMMVQ_OK);
    options_.window = 16;
    options_.sinks = 2;
    ASSERT_EQ(commvq_cache_create(codecs_, &options_, &cache_), COMMVQ_OK) << commvq_last_error();
  }
  void TearDown() override {
    commvq_cache_destroy(cache_);
    commvq_codecs_destroy(codecs_);
    fs::remove_all(folder_);
  }

  commvq_model model() const {
    commvq_model result{};
    result.struct_size = sizeof result;
    EXPECT_EQ(commvq_codecs_describe(codecs_, &result), COMMVQ_OK) << commvq_last_error();
    return result;
  }
  static void append(commvq_cache* cache, int layer, Index tokens, std::uint64_t seed) {
    Rng rng(seed);
    const std::vector<float> keys = normal_floats(rng, tokens * kChannels);
    const std::vector<float> values = normal_floats(rng, tokens * kChannels);
    const commvq_const_matrix k = rows_of(keys, kChannels), v = rows_of(values, kChannels);
    ASSERT_EQ(commvq_cache_append(cache, layer, &k, &v), COMMVQ_OK) << commvq_last_error();
  }
  static Index length(const commvq_cache* cache) {
    std::int64_t result = -1;
    EXPECT_EQ(commvq_cache_length(cache, &result), COMMVQ_OK) << commvq_last_error();
    return result;
  }
  static std::vector<float> attend_one(const commvq_cache* cache, int layer) {
    Rng rng(9);
    const std::vector<float> query = normal_floats(rng, kQueryChannels);
    std::vector<float> output(kQueryChannels);
    const commvq_const_matrix q = rows_of(query, kQueryChannels);
    const commvq_matrix o = rows_of(output, kQueryChannels);
    EXPECT_EQ(commvq_cache_attend(cache, layer, &q, nullptr, &o, nullptr), COMMVQ_OK)
        << commvq_last_error();
    return output;
  }

  fs::path folder_, path_;
  commvq_codecs* codecs_ = nullptr;
  commvq_cache_options options_{};
  commvq_cache* cache_ = nullptr;
};

TEST_F(CApiTest, ComputesWhatTheCppInterfaceComputes) {
  const ModelCodecs codecs = load_codecs(path_);
  CacheConfig config;
  config.rope = codecs.rope;
  config.num_kv_heads = kHeads;
  config.window = 16;
  config.sinks = 2;
  Cache expected(config, codecs.layers);
  Rng rng(2);
  const Index tokens = 150, queries = 3, stride = kChannels + 8;
  for (int layer = 0; layer < kLayers; ++layer) {
    const std::vector<float> keys = normal_floats(rng, tokens * stride);
    const std::vector<float> values = normal_floats(rng, tokens * kChannels);
    expected.layer(layer).append({keys.data(), tokens, kChannels, stride},
                                 {values.data(), tokens, kChannels});
    const commvq_const_matrix k{keys.data(), tokens, kChannels, stride};
    const commvq_const_matrix v = rows_of(values, kChannels);
    expect_status(commvq_cache_append(cache_, layer, &k, &v), COMMVQ_OK);
  }
  EXPECT_EQ(length(cache_), tokens);
  double bytes_per_token = 0;
  expect_status(commvq_cache_bytes_per_token(cache_, &bytes_per_token), COMMVQ_OK);
  EXPECT_EQ(bytes_per_token, kLayers * expected.layer(0).bytes_per_token());
  std::int64_t bytes = 0;
  expect_status(commvq_cache_allocated_bytes(cache_, &bytes), COMMVQ_OK);
  EXPECT_EQ(bytes, expected.allocated_bytes());

  commvq_attention_options attention;
  expect_status(commvq_attention_options_init(&attention, sizeof attention), COMMVQ_OK);
  attention.scale = 0.3f;
  attention.soft_cap = 5.0f;
  attention.sliding_window = 70;
  const std::vector<float> query = normal_floats(rng, queries * kQueryChannels);
  const commvq_const_matrix q = rows_of(query, kQueryChannels);
  for (int layer = 0; layer < kLayers; ++layer)
    for (const commvq_attention_options* options :
         {&attention, (commvq_attention_options*)nullptr}) {
      std::vector<float> output(query.size()), lse(queries * 4);
      std::vector<float> expected_output(query.size()), expected_lse(queries * 4);
      const commvq_matrix o = rows_of(output, kQueryChannels);
      expect_status(commvq_cache_attend(cache_, layer, &q, options, &o, lse.data()), COMMVQ_OK);
      AttentionOptions cpp;
      if (options != nullptr) cpp = {.scale = 0.3f, .sliding_window = 70, .soft_cap = 5.0f};
      attend(expected.layer(layer), as_matrix(query, queries, kQueryChannels), cpp,
             as_matrix(expected_output, queries, kQueryChannels), expected_lse.data());
      EXPECT_EQ(output, expected_output);
      EXPECT_EQ(lse, expected_lse);
    }
}

TEST_F(CApiTest, ExactSidesAndTypesReachTheCache) {
  double coded = 0, bytes = 0;
  expect_status(commvq_cache_bytes_per_token(cache_, &coded), COMMVQ_OK);
  const auto bytes_with = [&](int exact_keys, int exact_values, int type) {
    commvq_cache_options options = options_;
    options.exact_keys = exact_keys;
    options.exact_values = exact_values;
    options.exact_type = type;
    commvq_cache* cache = nullptr;
    expect_status(commvq_cache_create(codecs_, &options, &cache), COMMVQ_OK);
    expect_status(commvq_cache_bytes_per_token(cache, &bytes), COMMVQ_OK);
    commvq_cache_destroy(cache);
    return bytes;
  };
  EXPECT_EQ(bytes_with(1, 1, COMMVQ_FP32), kLayers * 2 * kChannels * 4);
  EXPECT_EQ(bytes_with(1, 1, COMMVQ_FP16), kLayers * 2 * kChannels * 2);
  EXPECT_EQ(bytes_with(0, 0, COMMVQ_FP32), coded);
  const double exact_keys = bytes_with(1, 0, COMMVQ_BF16);
  const double exact_values = bytes_with(0, 1, COMMVQ_BF16);
  EXPECT_NEAR(exact_keys + exact_values, coded + kLayers * 2 * kChannels * 2, 1e-9);
}

TEST_F(CApiTest, TruncateClearAndForkActOnAllLayers) {
  append(cache_, 0, 100, 3);
  EXPECT_EQ(length(cache_), 0) << "the other layer is empty";
  append(cache_, 1, 100, 4);
  EXPECT_EQ(length(cache_), 100);

  commvq_cache* fork = nullptr;
  expect_status(commvq_cache_fork(cache_, &fork), COMMVQ_OK);
  const std::vector<float> before = attend_one(cache_, 1);
  append(fork, 1, 50, 5);
  append(fork, 0, 50, 5);
  EXPECT_EQ(length(fork), 150);
  EXPECT_EQ(attend_one(cache_, 1), before);
  expect_status(commvq_cache_truncate(fork, 100), COMMVQ_OK);
  EXPECT_EQ(length(fork), 100);
  expect_status(commvq_cache_truncate(fork, 101), COMMVQ_INVALID_ARGUMENT, "101");
  expect_status(commvq_cache_truncate(fork, -1), COMMVQ_INVALID_ARGUMENT, "-1");
  EXPECT_EQ(length(fork), 100);
  expect_status(commvq_cache_clear(cache_), COMMVQ_OK);
  EXPECT_EQ(length(cache_), 0);
  EXPECT_EQ(length(fork), 100);
  commvq_cache_destroy(fork);
}

TEST_F(CApiTest, CachesOutliveTheirCodecs) {
  append(cache_, 0, 60, 6);
  const std::vector<float> before = attend_one(cache_, 0);
  commvq_codecs_destroy(codecs_);
  codecs_ = nullptr;
  EXPECT_EQ(attend_one(cache_, 0), before);
  append(cache_, 0, 60, 7);
}

TEST_F(CApiTest, DescribesTheModelItAccepts) {
  const commvq_model ours = model();
  EXPECT_EQ(ours.num_layers, kLayers);
  EXPECT_EQ(ours.num_kv_heads, kHeads);
  EXPECT_EQ(ours.head_dim, kHeadDim);
  EXPECT_EQ(ours.rope_scaling, COMMVQ_ROPE_LLAMA3);
  EXPECT_EQ(ours.rope_theta, 500000);
  EXPECT_STREQ(ours.digest, "digest-1");
  expect_status(commvq_codecs_require_model(codecs_, &ours), COMMVQ_OK);
}

TEST_F(CApiTest, CodebooksOfAnotherModelAreRefused) {
  const auto refuses = [&](auto change, commvq_status status, const char* part) {
    commvq_model other = model();
    change(other);
    expect_status(commvq_codecs_require_model(codecs_, &other), status, part);
  };
  refuses([](commvq_model& m) { m.digest = "digest-2"; }, COMMVQ_WRONG_MODEL, "digest-2");
  refuses([](commvq_model& m) { m.num_layers = 7; }, COMMVQ_WRONG_MODEL, "7");
  refuses([](commvq_model& m) { m.num_kv_heads = 9; }, COMMVQ_WRONG_MODEL, "9");
  refuses([](commvq_model& m) { m.head_dim = 64; }, COMMVQ_WRONG_MODEL, "64");
  refuses([](commvq_model& m) { m.rope_theta = 12345; }, COMMVQ_WRONG_MODEL, "12345");
  refuses([](commvq_model& m) { m.rope_scaling = COMMVQ_ROPE_UNSCALED; }, COMMVQ_WRONG_MODEL,
          "scaling");
  refuses([](commvq_model& m) { m.rope_layout = COMMVQ_ROPE_INTERLEAVED; }, COMMVQ_WRONG_MODEL,
          "layout");
  refuses([](commvq_model& m) { m.rope_layout = 2; }, COMMVQ_INVALID_ARGUMENT, "rope_layout is 2");
  refuses([](commvq_model& m) { m.rope_scaling = -1; }, COMMVQ_INVALID_ARGUMENT, "rope_scaling");
  refuses([](commvq_model& m) { m.head_dim = 31; }, COMMVQ_INVALID_ARGUMENT, "head_dim is 31");
  refuses([](commvq_model& m) { m.digest = nullptr; }, COMMVQ_INVALID_ARGUMENT, "digest is null");
}

TEST_F(CApiTest, BadFilesAreRefusedAndWriteNothing) {
  commvq_codecs* codecs = codecs_;
  expect_status(commvq_codecs_load((folder_ / "none").c_str(), &codecs), COMMVQ_BAD_FILE, "none");
  const fs::path text = folder_ / "text.safetensors";
  std::ofstream(text) << "not a codebook file";
  expect_status(commvq_codecs_load(text.c_str(), &codecs), COMMVQ_BAD_FILE, "text.safetensors");
  fs::resize_file(path_, fs::file_size(path_) - 1);
  expect_status(commvq_codecs_load(path_.c_str(), &codecs), COMMVQ_BAD_FILE, "codecs.safetensors");
  EXPECT_EQ(codecs, codecs_);
}

TEST_F(CApiTest, NullPointersAreRefusedByName) {
  const commvq_status invalid = COMMVQ_INVALID_ARGUMENT;
  const std::vector<float> rows(kChannels);
  const commvq_const_matrix in = rows_of(rows, kChannels);
  std::vector<float> written(kChannels);
  const commvq_matrix out = rows_of(written, kChannels);
  std::int64_t number;
  double real;
  commvq_codecs* codecs;
  commvq_cache* cache;
  commvq_model described = model();

  expect_status(commvq_codecs_load(nullptr, &codecs), invalid, "path is null");
  expect_status(commvq_codecs_load(path_.c_str(), nullptr), invalid, "codecs is null");
  expect_status(commvq_codecs_describe(nullptr, &described), invalid, "codecs is null");
  expect_status(commvq_codecs_describe(codecs_, nullptr), invalid, "model is null");
  expect_status(commvq_codecs_require_model(nullptr, &described), invalid, "codecs is null");
  expect_status(commvq_codecs_require_model(codecs_, nullptr), invalid, "commvq_model is null");
  expect_status(commvq_cache_options_init(nullptr, sizeof(commvq_cache_options)), invalid, "null");
  expect_status(commvq_attention_options_init(nullptr, sizeof(commvq_attention_options)), invalid,
                "null");
  expect_status(commvq_cache_create(nullptr, nullptr, &cache), invalid, "codecs is null");
  expect_status(commvq_cache_create(codecs_, nullptr, nullptr), invalid, "cache is null");
  expect_status(commvq_cache_fork(nullptr, &cache), invalid, "cache is null");
  expect_status(commvq_cache_fork(cache_, nullptr), invalid, "fork is null");
  expect_status(commvq_cache_append(nullptr, 0, &in, &in), invalid, "cache is null");
  expect_status(commvq_cache_append(cache_, 0, nullptr, &in), invalid, "keys is null");
  expect_status(commvq_cache_append(cache_, 0, &in, nullptr), invalid, "values is null");
  expect_status(commvq_cache_length(nullptr, &number), invalid, "cache is null");
  expect_status(commvq_cache_length(cache_, nullptr), invalid, "length is null");
  expect_status(commvq_cache_bytes_per_token(nullptr, &real), invalid, "cache is null");
  expect_status(commvq_cache_bytes_per_token(cache_, nullptr), invalid, "bytes is null");
  expect_status(commvq_cache_allocated_bytes(nullptr, &number), invalid, "cache is null");
  expect_status(commvq_cache_allocated_bytes(cache_, nullptr), invalid, "bytes is null");
  expect_status(commvq_cache_truncate(nullptr, 0), invalid, "cache is null");
  expect_status(commvq_cache_clear(nullptr), invalid, "cache is null");
  append(cache_, 0, 1, 8);
  expect_status(commvq_cache_attend(nullptr, 0, &in, nullptr, &out, nullptr), invalid,
                "cache is null");
  expect_status(commvq_cache_attend(cache_, 0, nullptr, nullptr, &out, nullptr), invalid,
                "queries is null");
  expect_status(commvq_cache_attend(cache_, 0, &in, nullptr, nullptr, nullptr), invalid,
                "output is null");
  commvq_codecs_destroy(nullptr);
  commvq_cache_destroy(nullptr);
}

TEST_F(CApiTest, StructSizesOfOtherVersions) {
  const commvq_status wrong = COMMVQ_WRONG_STRUCT_SIZE;
  commvq_cache* cache = nullptr;
  for (const std::size_t size :
       {std::size_t{0}, sizeof(commvq_attention_options) - 1, std::size_t{4097}}) {
    commvq_cache_options options = options_;
    options.struct_size = size;
    expect_status(commvq_cache_create(codecs_, &options, &cache), wrong, "commvq_cache_options");
    expect_status(commvq_cache_options_init(&options, size), wrong, "commvq_cache_options");
    EXPECT_EQ(options.window, 16) << "a failing init must not write";
    commvq_attention_options attention{};
    expect_status(commvq_attention_options_init(&attention, size), wrong,
                  "commvq_attention_options");
    commvq_model described = model();
    described.struct_size = size;
    expect_status(commvq_codecs_describe(codecs_, &described), wrong, "commvq_model");
    expect_status(commvq_codecs_require_model(codecs_, &described), wrong, "commvq_model");
  }
  EXPECT_EQ(cache, nullptr);

  // A newer header: fields that this library does not know are accepted as long as they are zero.
  struct {
    commvq_cache_options known;
    std::int64_t unknown;
  } newer{options_, 0};
  expect_status(commvq_cache_options_init(&newer.known, sizeof newer), COMMVQ_OK);
  EXPECT_EQ(newer.known.struct_size, sizeof newer);
  EXPECT_EQ(newer.known.window, 128);
  expect_status(commvq_cache_create(codecs_, &newer.known, &cache), COMMVQ_OK);
  commvq_cache_destroy(cache);
  newer.unknown = 1;
  expect_status(commvq_cache_create(codecs_, &newer.known, &cache), wrong, "newer");
}

TEST_F(CApiTest, CacheOptionsOutOfRangeAreRefusedByName) {
  const auto refuses = [&](auto change, const char* part) {
    commvq_cache_options options = options_;
    change(options);
    commvq_cache* cache = nullptr;
    expect_status(commvq_cache_create(codecs_, &options, &cache), COMMVQ_INVALID_ARGUMENT, part);
    EXPECT_EQ(cache, nullptr);
  };
  refuses([](commvq_cache_options& o) { o.window = -1; }, "window is -1");
  refuses([](commvq_cache_options& o) { o.sinks = -2; }, "sinks is -2");
  refuses([](commvq_cache_options& o) { o.page_size = 60; }, "page_size is 60");
  refuses([](commvq_cache_options& o) { o.exact_type = 3; }, "exact_type is 3");
  refuses([](commvq_cache_options& o) { o.exact_keys = 2; }, "exact_keys is 2");
  refuses([](commvq_cache_options& o) { o.exact_values = -1; }, "exact_values is -1");
  refuses([](commvq_cache_options& o) { o.reserved = 1; }, "reserved is 1");
}

TEST_F(CApiTest, ShapesThatDoNotFitAreRefusedAndChangeNothing) {
  append(cache_, 0, 10, 10);
  const std::vector<float> rows(4 * kChannels);
  const commvq_const_matrix good = rows_of(rows, kChannels);
  const auto refuses = [&](auto change, const char* part) {
    commvq_const_matrix keys = good;
    change(keys);
    expect_status(commvq_cache_append(cache_, 0, &keys, &good), COMMVQ_INVALID_ARGUMENT, part);
  };
  refuses([](commvq_const_matrix& m) { m.rows = -1; }, "keys has -1 rows");
  refuses([](commvq_const_matrix& m) { m.rows = 3; }, "[4, 64]");
  refuses([](commvq_const_matrix& m) { m.cols = 0; }, "0 columns");
  refuses([](commvq_const_matrix& m) { m.cols = 32; }, "[4, 32]");
  refuses([](commvq_const_matrix& m) { m.row_stride = 63; }, "row_stride of 63");
  refuses([](commvq_const_matrix& m) { m.row_stride = -64; }, "row_stride of -64");
  refuses([](commvq_const_matrix& m) { m.row_stride = Index{1} << 61; }, "more than can be");
  refuses([](commvq_const_matrix& m) { m.data = nullptr; }, "data is null");
  expect_status(commvq_cache_append(cache_, kLayers, &good, &good), COMMVQ_INVALID_ARGUMENT,
                "layer 2");
  expect_status(commvq_cache_append(cache_, -1, &good, &good), COMMVQ_INVALID_ARGUMENT, "layer -1");
  std::vector<float> bad = rows;
  bad[70] = std::nanf("");
  const commvq_const_matrix nan = rows_of(static_cast<const std::vector<float>&>(bad), kChannels);
  expect_status(commvq_cache_append(cache_, 0, &good, &nan), COMMVQ_INVALID_ARGUMENT,
                "value of token 11, channel 6");
  const commvq_const_matrix none{nullptr, 0, kChannels, kChannels};
  expect_status(commvq_cache_append(cache_, 0, &none, &none), COMMVQ_OK);
  append(cache_, 1, 10, 10);
  EXPECT_EQ(length(cache_), 10);
}

TEST_F(CApiTest, AttentionThatDoesNotFitIsRefusedAndWritesNothing) {
  append(cache_, 0, 40, 11);
  const std::vector<float> query(2 * kQueryChannels, 0.5f);
  std::vector<float> output(query.size(), -7.0f);
  const commvq_const_matrix q = rows_of(query, kQueryChannels);
  const commvq_matrix o = rows_of(output, kQueryChannels);
  const auto attend_with = [&](auto change) {
    commvq_attention_options options;
    EXPECT_EQ(commvq_attention_options_init(&options, sizeof options), COMMVQ_OK);
    change(options);
    return commvq_cache_attend(cache_, 0, &q, &options, &o, nullptr);
  };
  const commvq_status invalid = COMMVQ_INVALID_ARGUMENT;
  expect_status(attend_with([](auto& a) { a.scale = std::nanf(""); }), invalid, "scale is nan");
  expect_status(attend_with([](auto& a) { a.soft_cap = -1; }), invalid, "soft_cap is -1");
  expect_status(attend_with([](auto& a) { a.sliding_window = -1; }), invalid, "sliding_window");
  expect_status(attend_with([](auto& a) { a.causal = 2; }), invalid, "causal is 2");
  expect_status(attend_with([](auto& a) { a.reserved = 1; }), invalid, "reserved is 1");
  expect_status(attend_with([](auto& a) { a.struct_size = 4; }), COMMVQ_WRONG_STRUCT_SIZE,
                "struct_size is 4");
  expect_status(attend_with([](auto& a) { a.causal = 0; }), COMMVQ_UNSUPPORTED, "2 queries");
  const commvq_matrix narrow{output.data(), 2, kChannels, kQueryChannels};
  expect_status(commvq_cache_attend(cache_, 0, &q, nullptr, &narrow, nullptr), invalid, "[2, 64]");
  const commvq_const_matrix odd{query.data(), 1, kChannels + 32, kChannels + 32};
  expect_status(commvq_cache_attend(cache_, 0, &odd, nullptr, &o, nullptr), invalid, "96");
  expect_status(commvq_cache_attend(cache_, 2, &q, nullptr, &o, nullptr), invalid, "layer 2");
  expect_status(commvq_cache_attend(cache_, 1, &q, nullptr, &o, nullptr), invalid, "0 tokens");
  EXPECT_THAT(output, testing::Each(-7.0f));

  // One query sees the same with and without a causal mask.
  const commvq_const_matrix one{query.data(), 1, kQueryChannels, kQueryChannels};
  const commvq_matrix first{output.data(), 1, kQueryChannels, kQueryChannels};
  const commvq_matrix second{output.data() + kQueryChannels, 1, kQueryChannels, kQueryChannels};
  commvq_attention_options options;
  EXPECT_EQ(commvq_attention_options_init(&options, sizeof options), COMMVQ_OK);
  options.causal = 0;
  expect_status(commvq_cache_attend(cache_, 0, &one, &options, &first, nullptr), COMMVQ_OK);
  expect_status(commvq_cache_attend(cache_, 0, &one, nullptr, &second, nullptr), COMMVQ_OK);
  EXPECT_TRUE(
      std::equal(output.begin(), output.begin() + kQueryChannels, output.begin() + kQueryChannels));
}

TEST_F(CApiTest, LastErrorBelongsToItsThreadAndSurvivesSuccess) {
  expect_status(commvq_cache_truncate(cache_, 17), COMMVQ_INVALID_ARGUMENT, "17");
  std::thread([&] {
    EXPECT_STREQ(commvq_last_error(), "");
    expect_status(commvq_cache_truncate(cache_, 18), COMMVQ_INVALID_ARGUMENT, "18");
  }).join();
  expect_status(commvq_cache_clear(cache_), COMMVQ_OK);
  EXPECT_THAT(commvq_last_error(), AllOf(HasSubstr("17"), Not(HasSubstr("18"))));
}

#if !COMMVQ_INSTRUMENTED
// Memory is limited in a child process of its own; a failing append must leave the cache usable.
TEST_F(CApiTest, RunsOutOfMemoryWithAStatus) {
  const auto child = [&] {
    const Index tokens = Index{1} << 18;
    const std::vector<float> rows(static_cast<std::size_t>(tokens * kChannels), 0.5f);
    const commvq_const_matrix many = rows_of(rows, kChannels);
    Index pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    rlimit limit{};
    limit.rlim_cur = limit.rlim_max =
        static_cast<rlim_t>(pages * sysconf(_SC_PAGESIZE) + (1 << 22));
    if (setrlimit(RLIMIT_AS, &limit) != 0) _exit(2);
    if (commvq_cache_append(cache_, 0, &many, &many) != COMMVQ_OUT_OF_MEMORY) _exit(3);
    if (std::strstr(commvq_last_error(), "memory") == nullptr) _exit(4);
    append(cache_, 0, 4, 12);
    append(cache_, 1, 4, 12);
    _exit(length(cache_) == 4 ? 0 : 5);
  };
  EXPECT_EXIT(child(), testing::ExitedWithCode(0), "");
}
#endif

TEST(CApiStatus, EveryExceptionBecomesAStatus) {
  const auto thrown = [](auto exception) { return c_api::guarded([&] { throw exception; }); };
  expect_status(thrown(Error("e 1")), COMMVQ_INVALID_ARGUMENT, "e 1");
  expect_status(thrown(c_api::StatusError(COMMVQ_UNSUPPORTED, "e 2")), COMMVQ_UNSUPPORTED, "e 2");
  expect_status(thrown(std::bad_alloc()), COMMVQ_OUT_OF_MEMORY, "out of memory");
  expect_status(thrown(std::length_error("vector")), COMMVQ_OUT_OF_MEMORY, "addressed");
  expect_status(thrown(std::runtime_error("e 3")), COMMVQ_INTERNAL_ERROR, "e 3");
  expect_status(thrown(42), COMMVQ_INTERNAL_ERROR, "unknown");
  expect_status(thrown(Error(std::string(5000, 'x'))), COMMVQ_INVALID_ARGUMENT, "xxx");
  EXPECT_EQ(std::strlen(commvq_last_error()), 1023u);
}

TEST(CApiStatus, NamesAndVersion) {
  EXPECT_STREQ(commvq_status_name(COMMVQ_OK), "COMMVQ_OK");
  EXPECT_STREQ(commvq_status_name(COMMVQ_INTERNAL_ERROR), "COMMVQ_INTERNAL_ERROR");
  EXPECT_STREQ(commvq_status_name(8), "unknown");
  EXPECT_STREQ(commvq_status_name(-1), "unknown");
  EXPECT_STREQ(commvq_version(), COMMVQ_PROJECT_VERSION);
}

}  // namespace
}  // namespace commvq
