// `append` on the device, judged in double precision and against the host's codecs.
#include "commvq/cuda/append.hpp"

#include <limits>
#include <numeric>

#include <cuda_runtime_api.h>
#include <gmock/gmock.h>

#include "device.hpp"
#include "reference/append_reference.hpp"

namespace commvq::cuda {
namespace {

using testing::HasSubstr;
using testing_support::AppendCase;
using testing_support::AppendShape;
using testing_support::CodedToken;
using testing_support::DeviceArray;
using testing_support::is_nan_bf16;
using testing_support::Rng;

void check(cudaError_t error) {
  testing_support::check_cuda(error, "CUDA");
}

std::vector<std::uint16_t> bf16(const std::vector<float>& values) {
  std::vector<std::uint16_t> result;
  for (const float value : values) result.push_back(to_bf16(value));
  return result;
}

/// A case on the device.
struct DeviceCase {
  DeviceEncoder encoder;
  DeviceArray<float> keys, values;
  DeviceArray<std::int64_t> slot_mapping;
  DeviceArray<std::uint8_t> pages, workspace;

  explicit DeviceCase(const AppendCase& tested, ValuePrecision precision = ValuePrecision::kFp32)
      : encoder(prepare_encoder(tested.codec, tested.layout, precision)),
        keys(tested.keys),
        values(tested.values),
        slot_mapping(tested.slot_mapping),
        pages(tested.noise),
        workspace(append_workspace_size(encoder, tested.num_tokens)) {}

  AppendParams params(const AppendCase& tested) const {
    AppendParams params;
    params.num_tokens = tested.num_tokens;
    params.keys = keys.get();
    params.values = values.get();
    params.type = FloatType::kFp32;
    params.slot_mapping = slot_mapping.get();
    params.pages = {pages.get(), tested.layout.page_bytes};
    params.workspace = workspace.get();
    params.workspace_bytes = workspace.size();
    return params;
  }
};

constexpr double kFp32Tolerance = 1e-5;  // of logits, which are about 1
constexpr double kFp16Tolerance = 1e-2;

class AppendTest : public testing::Test {
 protected:
  void SetUp() override { COMMVQ_NEEDS_DEVICE(); }
  static void run(const AppendParams& params, const DeviceEncoder& encoder) {
    const Status status = append(encoder, params);
    ASSERT_TRUE(status.ok()) << status.message();
    check(cudaDeviceSynchronize());
  }
  /// Runs a case on the device; returns what is wrong with the pages.
  static std::string verdict(const AppendCase& tested,
                             ValuePrecision precision = ValuePrecision::kFp32) {
    DeviceCase device(tested, precision);
    run(device.params(tested), device.encoder);
    return tested.judge(device.pages.to_host(),
                        precision == ValuePrecision::kFp32 ? kFp32Tolerance : kFp16Tolerance);
  }
  Rng rng_{17};
};

TEST_F(AppendTest, CodesOfExactInputAreTheHosts) {
  struct Named {
    const char* name;
    AppendShape shape;
  };
  const Named cases[] = {
      {"greedy, head_dim 128",
       {.num_kv_heads = 2, .head_dim = 128, .num_tokens = 150, .codebook_size = 64}},
      {"greedy, many more thread blocks than run at once",
       {.num_kv_heads = 8,
        .head_dim = 128,
        .num_tokens = 6500,
        .codebook_size = 64,
        .num_stages = 2,
        .hidden_size = 8}},
      {"greedy, paper's stages, untied",
       {.num_kv_heads = 1,
        .head_dim = 128,
        .num_tokens = 70,
        .codebook_size = 64,
        .num_stages = 11,
        .tied = false}},
      {"head_dim 64, pages of 16", {.head_dim = 64, .num_tokens = 100, .page_size = 16}},
      {"head_dim 256 in two groups, pages of 32",
       {.head_dim = 256, .num_tokens = 40, .page_size = 32}},
      {"head_dim 256 in one group", {.head_dim = 256, .num_tokens = 40, .group_pairs = 128}},
      {"several planes, pages of 128",
       {.head_dim = 128,
        .num_tokens = 90,
        .num_stages = 7,
        .page_size = 128,
        .plane_bytes = 4 * 16 * 128}},
      {"odd sizes, interleaved, 2-bit values",
       {.num_kv_heads = 3,
        .head_dim = 64,
        .num_tokens = 50,
        .group_pairs = 4,
        .codebook_size = 7,
        .num_stages = 5,
        .tied = false,
        .layout = RopeLayout::kInterleaved,
        .bits = 2}},
      {"large codebook", {.num_tokens = 20, .codebook_size = 200, .num_stages = 2, .tied = false}},
      {"beam 2", {.head_dim = 128, .num_tokens = 45, .codebook_size = 64, .beam_width = 2}},
      {"beam 3", {.head_dim = 64, .num_tokens = 45, .beam_width = 3}},
      {"beam 8",
       {.head_dim = 128, .num_tokens = 35, .codebook_size = 64, .tied = false, .beam_width = 8}},
      {"beam 8, head_dim 256 in two groups",
       {.num_kv_heads = 1, .head_dim = 256, .num_tokens = 11, .beam_width = 8}},
      {"beam 16, fewer extensions than candidates",
       {.head_dim = 64, .num_tokens = 21, .codebook_size = 2, .beam_width = 16}},
  };
  for (const Named& named : cases) {
    SCOPED_TRACE(named.name);
    EXPECT_EQ(verdict(AppendCase::exact(rng_, named.shape)), "");
  }
}

TEST_F(AppendTest, CodesOfRealInputAreTheHostsUpToTies) {
  const AppendShape paper{
      .num_kv_heads = 2, .head_dim = 128, .num_tokens = 200, .codebook_size = 64, .num_stages = 11};
  EXPECT_EQ(verdict(AppendCase::random(rng_, paper)), "");
  AppendShape beam = paper;
  beam.beam_width = 8;
  beam.num_tokens = 60;
  EXPECT_EQ(verdict(AppendCase::random(rng_, beam)), "");
  AppendShape two_bit = paper;
  two_bit.num_stages = 21;
  two_bit.bits = 2;
  two_bit.num_tokens = 70;
  EXPECT_EQ(verdict(AppendCase::random(rng_, two_bit), ValuePrecision::kFp16), "");
}

TEST_F(AppendTest, CodesOfTheLibrarysOwnPresets) {
  // Queries weight the errors, every head has its norm, value codes are polished.
  AppendShape shape{.num_kv_heads = 2,
                    .head_dim = 128,
                    .num_tokens = 60,
                    .codebook_size = 64,
                    .num_stages = 11,
                    .tied = false,
                    .beam_width = 8,
                    .norm_per_head = true,
                    .weighted = true,
                    .polish_sweeps = 8};
  EXPECT_EQ(verdict(AppendCase::random(rng_, shape)), "");
  shape.graded_values = true;
  EXPECT_EQ(verdict(AppendCase::random(rng_, shape)), "");
  shape.bits = 2;
  shape.num_stages = 20;
  EXPECT_EQ(verdict(AppendCase::random(rng_, shape)), "");
  EXPECT_EQ(verdict(AppendCase::exact(
                rng_, {.num_tokens = 600, .num_stages = 2, .weighted = true, .polish_sweeps = 3})),
            "");
}

TEST_F(AppendTest, CodesOfTheSpeedPresets) {
  // Binary keys, and values with a block a head.
  AppendShape shape{.num_kv_heads = 2,
                    .head_dim = 128,
                    .num_tokens = 77,
                    .codebook_size = 2,
                    .num_stages = 60,
                    .tied = false,
                    .beam_width = 8,
                    .value_blocks = 2};
  EXPECT_EQ(verdict(AppendCase::exact(rng_, shape)), "");
  shape.num_tokens = 600;
  EXPECT_EQ(verdict(AppendCase::random(rng_, shape), ValuePrecision::kFp16), "");
  shape.norm_per_head = shape.weighted = true;
  shape.polish_sweeps = 8;
  EXPECT_EQ(verdict(AppendCase::random(rng_, shape)), "");
  shape.graded = true;
  EXPECT_EQ(verdict(AppendCase::random(rng_, shape)), "");
  shape.polish_sweeps = 3;
  EXPECT_EQ(verdict(AppendCase::exact(rng_, shape)), "");
  shape.num_tokens = 150;
  shape.num_stages = 124;
  shape.bits = 2;
  shape.scaled_values = true;
  EXPECT_EQ(verdict(AppendCase::exact(rng_, shape)), "");
  // Of random graded books 248 bits leave so little that ties within rounding are frequent.
  shape.graded = false;
  EXPECT_EQ(verdict(AppendCase::random(rng_, shape)), "");
  EXPECT_EQ(verdict(AppendCase::exact(rng_, {.num_kv_heads = 3,
                                             .num_tokens = 33,
                                             .codebook_size = 2,
                                             .num_stages = 8,
                                             .beam_width = 3,
                                             .scaled_values = true})),
            "");
}

TEST_F(AppendTest, LargeTilesOfTheMatrixProducts) {
  const AppendShape shape{.num_tokens = 700, .num_stages = 2, .hidden_size = 300};
  const AppendCase tested = AppendCase::exact(rng_, shape);
  EXPECT_EQ(verdict(tested, ValuePrecision::kFp16), "");
  EXPECT_EQ(verdict(tested, ValuePrecision::kFp32), "");
}

TEST_F(AppendTest, SlotsAreRewritten) {
  AppendCase tested = AppendCase::exact(rng_, {.num_tokens = 60, .page_size = 16});
  DeviceCase device(tested);
  run(device.params(tested), device.encoder);
  // The same places, other tokens.
  std::rotate(tested.keys.begin(), tested.keys.begin() + tested.num_channels(), tested.keys.end());
  std::rotate(tested.values.begin(), tested.values.begin() + tested.num_channels(),
              tested.values.end());
  device.keys.copy(tested.keys);
  device.values.copy(tested.values);
  run(device.params(tested), device.encoder);
  EXPECT_EQ(tested.judge(device.pages.to_host(), kFp32Tolerance), "");
}

TEST_F(AppendTest, WhatIsNotFiniteIsSeen) {
  AppendCase tested = AppendCase::exact(rng_, {.num_tokens = 30});
  const auto channels = static_cast<std::size_t>(tested.num_channels());
  std::fill(tested.slot_mapping.begin() + 20, tested.slot_mapping.end(), -1);
  tested.slot_mapping = {3, 7, 1, 0, 9, 12, 2, 5, 8, 4};
  tested.slot_mapping.resize(30, -1);
  tested.keys[1 * channels + 5] = std::numeric_limits<float>::quiet_NaN();
  tested.values[2 * channels + 6] = -std::numeric_limits<float>::infinity();
  std::fill_n(tested.keys.begin() + static_cast<std::ptrdiff_t>(3 * channels), channels, 0.0f);
  std::fill_n(tested.values.begin() + static_cast<std::ptrdiff_t>(4 * channels), channels, 0.0f);
  DeviceCase device(tested);
  run(device.params(tested), device.encoder);
  std::vector<std::uint8_t> pages = device.pages.to_host();
  EXPECT_EQ(tested.judge(pages, kFp32Tolerance), "");
  const CodedToken bad_key = tested.token_in(pages, 1);
  EXPECT_TRUE(is_nan_bf16(bad_key.key_norms[0]));
  EXPECT_THAT(bad_key.key_codes, testing::Each(0));
  EXPECT_FALSE(is_nan_bf16(bad_key.value_scales[0]));
  const CodedToken bad_value = tested.token_in(pages, 2);
  EXPECT_TRUE(is_nan_bf16(bad_value.value_scales[0]));
  EXPECT_THAT(bad_value.value_code, testing::Each(0));
  EXPECT_FALSE(is_nan_bf16(bad_value.key_norms[0]));
  EXPECT_EQ(tested.token_in(pages, 3).key_norms[0], 0);
  const CodedToken zero_value = tested.token_in(pages, 4);
  EXPECT_EQ(zero_value.value_scales[0], 0);
  EXPECT_THAT(zero_value.value_code, testing::Each(0));
}

TEST_F(AppendTest, ExactCopiesAreWrittenAndCoded) {
  AppendCase tested = AppendCase::random(rng_, {.num_tokens = 50});
  const auto channels = static_cast<std::size_t>(tested.num_channels());
  DeviceCase device(tested);
  std::vector<std::int64_t> rows(50, -1);
  for (std::size_t t = 0; t < 50; t += 2) rows[t] = static_cast<std::int64_t>(49 - t);
  const DeviceArray<std::int64_t> exact_mapping(rows);
  const std::vector<std::uint16_t> untouched(50 * channels, 0xabcd);
  const DeviceArray<std::uint16_t> exact_keys(untouched), exact_values(untouched);
  AppendParams params = device.params(tested);
  params.exact = {exact_keys.get(), exact_values.get(), FloatType::kBf16, 10, 40};
  params.exact_mapping = exact_mapping.get();
  run(params, device.encoder);

  std::vector<std::uint16_t> expected_keys = untouched, expected_values = untouched;
  const std::vector<std::uint16_t> keys = bf16(tested.keys), values = bf16(tested.values);
  for (std::size_t t = 0; t < 50; t += 2) {
    const auto to = static_cast<std::ptrdiff_t>(rows[t]) * static_cast<std::ptrdiff_t>(channels);
    const auto from = static_cast<std::ptrdiff_t>(t * channels);
    std::copy_n(keys.begin() + from, channels, expected_keys.begin() + to);
    std::copy_n(values.begin() + from, channels, expected_values.begin() + to);
  }
  EXPECT_EQ(exact_keys.to_host(), expected_keys);
  EXPECT_EQ(exact_values.to_host(), expected_values);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    tested.keys[i] = from_bf16(keys[i]);
    tested.values[i] = from_bf16(values[i]);
  }
  EXPECT_EQ(tested.judge(device.pages.to_host(), kFp32Tolerance), "");
}

TEST_F(AppendTest, CopiesAloneThenCodesOfTheCopies) {
  AppendCase tested = AppendCase::random(rng_, {.num_tokens = 50});
  DeviceCase device(tested);
  std::vector<std::int64_t> rows(50);
  std::iota(rows.rbegin(), rows.rend(), 0);
  const DeviceArray<std::int64_t> exact_mapping(rows);
  const DeviceArray<std::uint16_t> exact_keys(tested.keys.size()),
      exact_values(tested.values.size());
  AppendParams params = device.params(tested);
  params.exact = {exact_keys.get(), exact_values.get(), FloatType::kBf16, 10, 40};
  params.exact_mapping = exact_mapping.get();
  params.slot_mapping = nullptr;
  params.pages = {};
  params.workspace = nullptr;
  params.workspace_bytes = 0;
  run(params, device.encoder);
  EXPECT_EQ(device.pages.to_host(), tested.noise);

  // The copies' rows are the tokens backwards; so is the slot mapping now.
  std::reverse(tested.slot_mapping.begin(), tested.slot_mapping.end());
  device.slot_mapping.copy(tested.slot_mapping);
  AppendParams later = device.params(tested);
  later.keys = exact_keys.get();
  later.values = exact_values.get();
  later.type = FloatType::kBf16;
  run(later, device.encoder);
  const auto channels = static_cast<std::size_t>(tested.num_channels());
  for (std::vector<float>* numbers : {&tested.keys, &tested.values}) {
    std::vector<float> backwards;
    for (std::size_t t = 50; t-- > 0;)
      for (std::size_t c = 0; c < channels; ++c)
        backwards.push_back(from_bf16(to_bf16((*numbers)[t * channels + c])));
    *numbers = backwards;
  }
  EXPECT_EQ(tested.judge(device.pages.to_host(), kFp32Tolerance), "");
}

TEST_F(AppendTest, HalfPrecisionInputsAreReadAsTheyAre) {
  for (const FloatType type : {FloatType::kBf16, FloatType::kFp16}) {
    SCOPED_TRACE(name_of(type));
    const AppendCase tested = AppendCase::exact(rng_, {.num_tokens = 30});  // small integers
    DeviceCase device(tested);
    std::vector<std::uint16_t> keys, values;
    for (const float x : tested.keys)
      keys.push_back(type == FloatType::kBf16 ? to_bf16(x) : to_fp16(x));
    for (const float x : tested.values)
      values.push_back(type == FloatType::kBf16 ? to_bf16(x) : to_fp16(x));
    const DeviceArray<std::uint16_t> device_keys(keys), device_values(values);
    AppendParams params = device.params(tested);
    params.keys = device_keys.get();
    params.values = device_values.get();
    params.type = type;
    run(params, device.encoder);
    EXPECT_EQ(tested.judge(device.pages.to_host(), kFp32Tolerance), "");
  }
}

TEST_F(AppendTest, CapturedGraphReplaysWithOtherTokensAndPlaces) {
  AppendCase tested = AppendCase::exact(rng_, {.num_tokens = 40, .beam_width = 2});
  DeviceCase device(tested);
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream));
  AppendParams params = device.params(tested);
  params.stream = stream;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  const Status status = append(device.encoder, params);
  check(cudaStreamEndCapture(stream, &graph));
  ASSERT_TRUE(status.ok()) << status.message();
  check(cudaGraphInstantiate(&executable, graph, 0));
  for (int replay = 0; replay < 2; ++replay) {
    SCOPED_TRACE(replay);
    std::rotate(tested.keys.begin(), tested.keys.begin() + tested.num_channels(),
                tested.keys.end());
    tested.scatter(rng_);
    device.keys.copy(tested.keys);
    device.slot_mapping.copy(tested.slot_mapping);
    device.pages.copy(tested.noise);
    check(cudaGraphLaunch(executable, stream));
    check(cudaStreamSynchronize(stream));
    EXPECT_EQ(tested.judge(device.pages.to_host(), kFp32Tolerance), "");
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST_F(AppendTest, RefusesWhatItCannotDo) {
  const AppendCase tested = AppendCase::exact(rng_, {.num_tokens = 5, .num_stages = 1});
  DeviceCase device(tested);
  const auto status_with = [&](auto change) {
    AppendParams params = device.params(tested);
    change(params);
    return append(device.encoder, params);
  };
  EXPECT_TRUE(status_with([](AppendParams& p) { p.num_tokens = 0; }).ok());
  const auto expect = [&](auto change, StatusCode code, const char* text) {
    const Status status = status_with(change);
    EXPECT_EQ(status.code(), code) << text;
    EXPECT_THAT(status.message(), HasSubstr(text));
  };
  expect([](AppendParams& p) { p.num_tokens = -1; }, StatusCode::kInvalidArgument,
         "num_tokens is -1");
  expect([](AppendParams& p) { p.slot_mapping = nullptr; }, StatusCode::kInvalidArgument,
         "slot_mapping and exact_mapping are null");
  expect([](AppendParams& p) { --p.workspace_bytes; }, StatusCode::kWorkspaceTooSmall, "need");
  expect([](AppendParams& p) { p.pages.page_stride = 8; }, StatusCode::kInvalidArgument,
         "page_stride is 8");
  expect([](AppendParams& p) { p.values = static_cast<const float*>(p.values) + 1; },
         StatusCode::kInvalidArgument, "not on 16 bytes");
  expect([](AppendParams& p) { p.exact.keys = p.workspace; }, StatusCode::kInvalidArgument,
         "exact");
  EXPECT_THROW(prepare_encoder({tested.codec.keys, nullptr}, tested.layout), Error);
  const AppendCase wide = AppendCase::exact(rng_, {.num_tokens = 1, .beam_width = 17});
  EXPECT_THROW(prepare_encoder(wide.codec, wide.layout), Error);
}

}  // namespace
}  // namespace commvq::cuda
