// Decode attention on the device against the formula in double precision.
#include "commvq/cuda/decode_attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "cuda/decode_case.hpp"

namespace commvq::cuda::testing_support {
namespace {

/// Largest difference allowed of an output element, relative to the largest of its row, and of a
/// log-sum-exp. Keys and weights pass through fp16 (2^-11 each), the output through its own type.
struct Tolerance {
  double output;
  double lse;
};
Tolerance tolerance_of(FloatType type) {
  return type == FloatType::kBf16 ? Tolerance{8e-3, 4e-3} : Tolerance{5e-3, 4e-3};
}

void expect_matches(const DecodeSetup& setup, const DecodeCase& c) {
  const reference::AttentionResult expected = setup.expected();
  const std::vector<float> output = setup.output(), lse = setup.lse();
  const auto dim = static_cast<std::size_t>(c.head_dim());
  const Tolerance tolerance = tolerance_of(c.type);
  double worst_output = 0, worst_lse = 0;
  std::size_t worst_row = 0;
  const std::size_t rows =
      static_cast<std::size_t>(c.batch() * c.num_query_tokens * c.num_q_heads());
  for (std::size_t row = 0; row < rows; ++row) {
    double largest = 0, difference = 0;
    for (std::size_t d = 0; d < dim; ++d) {
      const double x = output[row * dim + d], y = expected.output[row * dim + d];
      largest = std::max(largest, std::abs(y));
      difference = std::isnan(x) ? INFINITY : std::max(difference, std::abs(x - y));
    }
    if (difference / largest > worst_output) {
      worst_output = difference / largest;
      worst_row = row;
    }
    const double lse_difference = std::abs(lse[row] - expected.lse[row]);
    worst_lse = std::isnan(lse_difference) ? INFINITY : std::max(worst_lse, lse_difference);
  }
  std::printf("  %-28s output %.2e, log-sum-exp %.2e\n", c.name.c_str(), worst_output, worst_lse);
  EXPECT_LE(worst_output, tolerance.output) << "row " << worst_row;
  EXPECT_LE(worst_lse, tolerance.lse);
}

class DecodeAttentionCases : public testing::TestWithParam<DecodeCase> {};

TEST_P(DecodeAttentionCases, MatchesDoublePrecision) {
  COMMVQ_NEEDS_DEVICE();
  DecodeSetup setup(GetParam());
  const DecodeAttention call = setup.call();
  const Status status = decode_attention(setup.codebooks(), call);
  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << cudaGetErrorString(cudaGetLastError());
  expect_matches(setup, GetParam());
  // The same call gives the same bytes.
  const std::vector<float> first = setup.output();
  ASSERT_TRUE(decode_attention(setup.codebooks(), setup.call()).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const std::vector<float> again = setup.output();
  const auto place = std::mismatch(first.begin(), first.end(), again.begin()).first;
  if (place != first.end()) {
    const auto i = static_cast<std::size_t>(place - first.begin());
    ADD_FAILURE() << "number " << i << " of " << first.size() << " is " << again[i] << ", and was "
                  << first[i] << " after the same call before; read once more it is "
                  << setup.output()[i];
  }
}

std::vector<DecodeCase> all_cases() {
  const KeyCodecConfig paper1 = key_config(128, 64, 64, 11);
  const KeyCodecConfig paper2 = key_config(128, 64, 64, 21);
  std::vector<DecodeCase> cases;
  const auto add = [&](const char* name, const KeyCodecConfig& keys) -> DecodeCase& {
    DecodeCase& c = cases.emplace_back();
    c.name = name;
    c.keys = keys;
    return c;
  };
  const KeyCodecConfig binary = key_config(128, 64, 2, 60);
  const auto add_binary = [&](const char* name) -> DecodeCase& {
    DecodeCase& c = add(name, binary);
    c.keys.norm_per_head = true;
    c.value_blocks = c.num_kv_heads;
    return c;
  };
  add_binary("binary");
  add_binary("binary_short").lengths = {160};
  add_binary("binary_long").lengths = {20000};
  add_binary("binary_fast_turns").theta = 10000.0;
  add_binary("binary_fastest_turns").theta = 10.0;
  const auto with_2bits = [](DecodeCase& c, double theta) {
    c.keys.num_stages = 124;
    c.value_bits = 2;
    c.theta = theta;
    c.lengths = {3000, 200};
  };
  with_2bits(add_binary("binary_2bit"), 500000.0);
  with_2bits(add_binary("binary_2bit_fast_turns"), 10000.0);
  const auto add_graded = [&](const char* name) -> DecodeCase& {
    DecodeCase& c = add_binary(name);
    c.keys.graded = true;
    return c;
  };
  add_graded("graded");
  add_graded("graded_short").lengths = {160};
  add_graded("graded_long").lengths = {20000};
  add_graded("graded_fast_turns").theta = 10000.0;
  add_graded("graded_fastest_turns").theta = 10.0;
  for (const double theta : {500000.0, 10000.0, 10.0})
    with_2bits(add_graded(("graded_2bit_" + std::to_string(static_cast<int>(theta))).c_str()),
               theta);
  add_binary("binary_norm_per_token").keys.norm_per_head = false;
  for (const int page_size : {16, 32, 128}) {
    auto& c = add_binary(("binary_page" + std::to_string(page_size)).c_str());
    c.page_size = page_size;
    c.lengths = {515, 16, 1, 129, 2200, 700};
  }
  for (const int group : {1, 3, 8, 48}) {
    auto& c = add_binary(("binary_group" + std::to_string(group)).c_str());
    c.group = group;
    c.num_query_tokens = group == 3 ? 5 : 1;
    c.lengths = {900, 300};
  }
  auto& binary_mixed = add_binary("binary_sinks_cap_sliding");
  binary_mixed.sinks = 5;
  binary_mixed.soft_cap = 5;
  binary_mixed.sliding_window = 500;
  binary_mixed.type = FloatType::kBf16;
  binary_mixed.layout = RopeLayout::kInterleaved;
  binary_mixed.keys.pairs.layout = RopeLayout::kInterleaved;
  binary_mixed.lengths = {1200, 444, 30};
  add("1bit", paper1);
  add("1bit_long", paper1).lengths = {5000};
  add("1bit_bf16", paper1).type = FloatType::kBf16;
  add("1bit_llama_heads", paper1).num_kv_heads = 8;
  add("2bit", paper2).value_bits = 2;
  auto& ragged = add("2bit_ragged", paper2);
  ragged.value_bits = 2;
  ragged.lengths = {1, 40, 129, 160, 777, 2048, 31, 128, 1500};
  ragged.page_size = 32;
  for (const int page_size : {16, 32, 128}) {
    auto& c = add(("1bit_page" + std::to_string(page_size)).c_str(), paper1);
    c.page_size = page_size;
    c.lengths = {515, 16, 200};
  }
  auto& bare = add("no_exact", paper1);
  bare.window = 0;
  bare.lengths = {1, 257, 1000};
  auto& sinks = add("sinks_and_window", paper1);
  sinks.sinks = 5;
  sinks.window = 33;
  sinks.lengths = {3, 6, 400, 39};
  for (const int group : {1, 2, 3, 8, 16, 71}) {
    auto& c = add(("group" + std::to_string(group)).c_str(), paper1);
    c.group = group;
    c.lengths = {700};
  }
  for (const int tokens : {2, 5, 16}) {
    auto& c = add(("query_tokens" + std::to_string(tokens)).c_str(), paper1);
    c.num_query_tokens = tokens;
    c.lengths = {600, 200, 100};
  }
  auto& wide = add("16_tokens_of_8_heads", paper1);
  wide.num_query_tokens = 16;
  wide.group = 8;
  wide.lengths = {400};
  auto& two = add("2bit_query_tokens", paper2);
  two.value_bits = 2;
  two.num_query_tokens = 4;
  two.sinks = 2;
  two.lengths = {600, 300};
  auto& sliding = add("sliding_window", paper1);
  sliding.sliding_window = 300;
  sliding.sinks = 4;
  sliding.lengths = {1000, 250, 303};
  auto& capped = add("soft_cap", paper1);
  capped.soft_cap = 5.0f;
  capped.lengths = {900};
  KeyCodecConfig commvq2 = key_config(128, 64, 64, 20);
  commvq2.norm_per_head = true;
  auto& norms = add("2bit_norm_per_head", commvq2);
  norms.value_bits = 2;
  norms.lengths = {500, 1300};
  KeyCodecConfig commvq1 = paper1;
  commvq1.norm_per_head = true;
  auto& norms1 = add("1bit_norm_per_head_page16", commvq1);
  norms1.page_size = 16;
  norms1.lengths = {290};
  // As many as calibrate may give a layer: up to 22, by one kernel of six, and more, for which
  // kernels take turns.
  std::vector<int> numbers = {25, 35, 40};
  for (int stages = 1; stages <= 22; ++stages) numbers.push_back(stages);
  for (const int stages : numbers) {
    KeyCodecConfig spread = commvq1;
    spread.num_stages = stages;
    add(("stages" + std::to_string(stages)).c_str(), spread).lengths = {700, 150};
  }
  auto& tied = add("tied_13_stages_page16", key_config(128, 64, 64, 13));
  tied.page_size = 16;
  tied.num_query_tokens = 3;
  tied.lengths = {290};
  add("head_dim64", key_config(64, 32, 64, 5)).lengths = {800, 33};
  add("head_dim256", key_config(256, 64, 64, 11)).lengths = {400};
  auto& odd_group = add("head_dim256_group3", key_config(256, 64, 64, 11));
  odd_group.group = 3;
  odd_group.sinks = 3;
  odd_group.lengths = {400, 90};
  add("7bit_8_books", key_config(128, 64, 128, 4)).lengths = {900};
  add("7bit_10_books", key_config(128, 64, 128, 5)).lengths = {900};
  add("odd_codebook", key_config(128, 64, 37, 7)).lengths = {500};
  add("small_groups", key_config(128, 16, 64, 4)).lengths = {500};
  auto& interleaved = add("interleaved", key_config(128, 64, 64, 11, RopeLayout::kInterleaved));
  interleaved.lengths = {500};
  interleaved.theta = 10000.0;
  return cases;
}

INSTANTIATE_TEST_SUITE_P(All, DecodeAttentionCases, testing::ValuesIn(all_cases()),
                         [](const auto& test) { return test.param.name; });

TEST(DecodeAttention, ACapturedGraphFollowsLengths) {
  COMMVQ_NEEDS_DEVICE();
  DecodeCase c;
  c.name = "graph";
  c.keys = key_config(128, 64, 64, 11);
  c.lengths = {1200, 300, 900};
  c.spare = 2000;  // exact rows of all tokens, so that shorter lengths keep their windows
  DecodeSetup setup(c);
  DecodeAttention call = setup.call();
  cudaStream_t stream;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  call.stream = stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  const Status status = decode_attention(setup.codebooks(), call);
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_EQ(cudaGraphInstantiate(&replay, graph, 0), cudaSuccess);
  for (const std::vector<int>& lengths :
       {std::vector<int>{1200, 300, 900}, {100, 299, 17}, {1, 200, 700}}) {
    setup.set_lengths(lengths);
    c.lengths = lengths;
    ASSERT_EQ(cudaGraphLaunch(replay, stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    expect_matches(setup, c);
  }
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST(DecodeAttention, SequencesThatDoNotFitGetNan) {
  COMMVQ_NEEDS_DEVICE();
  DecodeCase c;
  c.name = "nan";
  c.keys = key_config(128, 64, 64, 11);
  c.lengths = {3000};
  DecodeSetup setup(c);
  DecodeAttention call = setup.call();
  call.limits.total_tokens = 1000;
  ASSERT_TRUE(decode_attention(setup.codebooks(), call).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  for (const float x : setup.output()) ASSERT_TRUE(std::isnan(x));
}

TEST(DecodeAttention, RefusalsNameValueAndLimit) {
  COMMVQ_NEEDS_DEVICE();
  DecodeCase c;
  c.name = "refusals";
  c.keys = key_config(128, 64, 64, 11);
  DecodeSetup setup(c);
  const auto expect = [&](StatusCode code, const char* text, auto change) {
    DecodeAttention call = setup.call();
    change(call);
    const Status status = decode_attention(setup.codebooks(), call);
    EXPECT_EQ(status.code(), code) << status.message();
    EXPECT_THAT(status.message(), testing::HasSubstr(text));
  };
  expect(StatusCode::kOk, "", [](DecodeAttention&) {});
  expect(StatusCode::kInvalidArgument, "num_query_tokens is 17",
         [](DecodeAttention& call) { call.limits.num_query_tokens = 17; });
  expect(StatusCode::kInvalidArgument, "num_q_heads is 7",
         [](DecodeAttention& call) { call.limits.num_q_heads = 7; });
  expect(StatusCode::kUnsupported, "at most 1024",
         [](DecodeAttention& call) { call.limits.num_q_heads = 2 * 1025; });
  expect(StatusCode::kUnsupported, "fp32",
         [](DecodeAttention& call) { call.type = FloatType::kFp32; });
  expect(StatusCode::kInvalidArgument, "exact.capacity is 100",
         [](DecodeAttention& call) { call.exact.capacity = 100; });
  expect(StatusCode::kInvalidArgument, "page_stride",
         [](DecodeAttention& call) { call.pages.page_stride -= 64; });
  expect(StatusCode::kWorkspaceTooSmall, "workspace has 256 bytes",
         [](DecodeAttention& call) { call.workspace_bytes = 256; });
  expect(StatusCode::kInvalidArgument, "must not be null",
         [](DecodeAttention& call) { call.seq_lens = nullptr; });
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

}  // namespace
}  // namespace commvq::cuda::testing_support
