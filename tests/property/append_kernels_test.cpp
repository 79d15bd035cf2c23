// The kernels of `append` on the host, compared with the host's codecs. What needs a GPU is in
// tests/cuda.
#include <gmock/gmock.h>

#include "reference/append_reference.hpp"
// What stands in for CUDA comes before the kernels.
// clang-format off
#include "simt/simt.hpp"

#include "../../kernels/append/binary_search_tables.cpp"
#include "../../kernels/append/encoder_image.cpp"
#include "../../kernels/append/key_searches.cuh"
#include "../../kernels/append/key_search_tables.cpp"
#include "../../kernels/append/load_tokens.cuh"
#include "../../kernels/append/matrix_product.cuh"
#include "../../kernels/append/polish_values.cuh"
#include "../../kernels/append/search_stages.cpp"
#include "../../kernels/append/write_values.cuh"
// clang-format on

namespace commvq::cuda {
namespace {

using testing_support::AppendCase;
using testing_support::Rng;

/// The launches of `append`, with small or with large tiles and blocks, and with searches by
/// warpgroups where they can be.
class HostAppend {
 public:
  HostAppend(const AppendCase& tested, ValuePrecision precision, bool small, bool by_warpgroups)
      : image_(tested.codec, tested.layout, precision, by_warpgroups),
        view_(image_.view_at(image_.bytes().data())),
        small_(small),
        by_warpgroups_(view_.keys.search_stages != nullptr) {}

  bool by_warpgroups() const { return by_warpgroups_; }

  void operator()(const AppendCase& tested, std::vector<std::uint8_t>& pages) {
    const Index tokens = tested.num_tokens;
    const std::size_t bytes = AppendWorkspace(view_, tokens, nullptr).bytes;
    std::vector<double> memory(bytes / 8 + 1, std::nan(""));
    const AppendWorkspace workspace(view_, tokens, memory.data());
    const PagedCodes paged{pages.data(), tested.layout.page_bytes};
    const std::int64_t* const places = tested.slot_mapping.data();
    const auto blocks = [&](Index per_block) {
      return static_cast<unsigned>((tokens + per_block - 1) / per_block);
    };
    TokenRows keys{
        tested.keys.data(),   FloatType::kFp32, nullptr, FloatType::kBf16, false, nullptr,
        view_.num_channels(), nullptr};
    TokenRows rows = keys;
    rows.data = tested.values.data();
    rows.channel_scales = view_.values.channel_scales;
    const int key_parts = tested.layout.norms_per_token;
    simt::launch(
        {blocks(kTokenThreads / 32), static_cast<unsigned>(key_parts + view_.values.num_blocks)},
        kTokenThreads, [&] {
          load_tokens<FloatType::kFp32>(view_, keys, rows, tokens, key_parts, paged, places,
                                        workspace);
        });
    ASSERT_LE(KeySearchShared(view_.keys, kKeySearch.num_rows).bytes, Index{sizeof shared});
    if (view_.keys.binary.num_bytes > 0)
      search_binary_keys(tokens, workspace, paged, places);
    else if (by_warpgroups_)
      search_by_warpgroups(tokens, workspace, paged, places);
    else if (small_)
      search_keys<kKeySearch.num_rows_small>(tokens, workspace, paged, places);
    else
      search_keys<kKeySearch.num_rows>(tokens, workspace, paged, places);

    const ValueEncoderView& values = view_.values;
    const Index num_rows = tokens * values.num_blocks;
    const simt::Dim parts{blocks(kTokenThreads / 32), static_cast<unsigned>(values.num_blocks)};
    const int terms = values.num_terms();
    std::uint16_t* const rest = workspace.hidden + num_rows * values.output.num_inputs;
    if (terms > 1)
      multiply_by(values.hidden, workspace.inputs, tokens, terms,
                  HiddenEpilogue<true>{values.hidden, values.hidden_scale, workspace.hidden, rest,
                                       values.output.num_inputs});
    else
      multiply_by(values.hidden, workspace.inputs, tokens, terms,
                  HiddenEpilogue<false>{values.hidden, values.hidden_scale, workspace.hidden, rest,
                                        values.output.num_inputs});
    multiply_by(values.output, workspace.hidden, tokens, terms,
                PatternEpilogue{values.output, workspace.bits, values.decoder.num_inputs});
    if (values.polish_sweeps > 0) polish(tokens, workspace);
    multiply_by(values.decoder, workspace.bits, tokens, terms > 1 ? 2 : 1,
                SquaresEpilogue{workspace.squares, num_rows});
    const int tile_cols = small_ ? kSmallTile.cols : kLargeTile.cols;
    simt::launch(parts, kTokenThreads, [&] {
      write_values(view_, tokens, workspace.value_norms, workspace.bits, workspace.squares,
                   values.decoder.num_padded_outputs / tile_cols, paged, places);
    });
  }

 private:
  template <int kNumRows>
  void search_keys(Index tokens, const AppendWorkspace& workspace, const PagedCodes& paged,
                   const std::int64_t* places) {
    const Index per_block = kNumRows / view_.keys.beam_width;
    const simt::Dim grid{static_cast<unsigned>((tokens + per_block - 1) / per_block),
                         static_cast<unsigned>(view_.layout.num_kv_heads),
                         static_cast<unsigned>(view_.layout.num_groups)};
    const auto kernel = key_search<kNumRows>(search_kind(view_.keys));
    simt::launch(grid, kKeySearch.num_threads, [&] {
      kernel(view_, tokens, workspace.unit_keys, workspace.key_norms, paged, places);
    });
  }

  void search_by_warpgroups(Index tokens, const AppendWorkspace& workspace, const PagedCodes& paged,
                            const std::int64_t* places) {
    EncoderView on_device = view_;
    on_device.warpgroup_processors = 132;
    const KeySearchLaunch search = warpgroup_search(on_device, small_ ? 1 : kMaxTokens);
    ASSERT_LE(search.shared_bytes, static_cast<int>(sizeof shared));
    simt::launch({static_cast<unsigned>((tokens + search.num_tokens - 1) / search.num_tokens),
                  static_cast<unsigned>(view_.layout.num_kv_heads),
                  static_cast<unsigned>(view_.layout.num_groups)},
                 kWarpgroupSearch.num_threads, [&] {
                   search.kernel(view_, tokens, workspace.unit_keys, workspace.key_norms, paged,
                                 places);
                 });
  }

  void search_binary_keys(Index tokens, const AppendWorkspace& workspace, const PagedCodes& paged,
                          const std::int64_t* places) {
    constexpr Index kPerBlock = kBinarySearch.num_tokens;
    ASSERT_LE(BinarySearchShared(view_.keys).bytes, Index{sizeof shared});
    const auto kernel = binary_search(view_.keys);
    simt::launch({static_cast<unsigned>((tokens + kPerBlock - 1) / kPerBlock),
                  static_cast<unsigned>(view_.layout.num_kv_heads)},
                 kBinarySearch.num_threads, [&] {
                   kernel(view_, tokens, workspace.unit_keys, workspace.key_norms, paged, places);
                 });
  }

  void polish(Index tokens, const AppendWorkspace& workspace) {
    const ValueEncoderView& values = view_.values;
    const Index num_rows = tokens * values.num_blocks;
    multiply_by(values.rows, workspace.units, tokens, 3,
                ProductEpilogue{values.rows.product_factor, workspace.value_products,
                                values.num_code_bits});
    multiply_by(
        values.gram, workspace.bits, tokens, 2,
        ProductEpilogue{values.gram.product_factor, workspace.sum_products, values.num_code_bits});
    simt::launch({static_cast<unsigned>(num_rows)}, 32, [&] {
      const auto kernel = value_polish(values.num_code_bits, values.graded);
      kernel(view_, tokens, workspace.value_products, workspace.sum_products, workspace.bits);
    });
  }

  template <class Epilogue>
  void multiply_by(const Weights& weights, const std::uint16_t* inputs, Index tokens, int terms,
                   const Epilogue& epilogue) {
    const int num_blocks = view_.values.num_blocks;
    const MatrixProduct product(weights, inputs, num_blocks, tokens, terms);
    const TileConfig tile = small_ ? kSmallTile : kLargeTile;
    const simt::Dim grid{static_cast<unsigned>(weights.num_padded_outputs / tile.cols),
                         static_cast<unsigned>((tokens + tile.rows - 1) / tile.rows),
                         static_cast<unsigned>(num_blocks)};
    simt::launch(grid, static_cast<unsigned>(tile.num_threads()), [&] {
      if (small_)
        multiply<false>(product, epilogue);
      else
        multiply<true>(product, epilogue);
    });
  }

  EncoderImage image_;
  EncoderView view_;
  bool small_, by_warpgroups_;
};

void expect_right_codes(const AppendCase& tested, ValuePrecision precision, bool small) {
  for (const bool by_warpgroups : {false, true}) {
    SCOPED_TRACE(by_warpgroups);
    std::vector<std::uint8_t> pages = tested.noise;
    HostAppend append(tested, precision, small, by_warpgroups);
    if (by_warpgroups && !append.by_warpgroups()) return;
    append(tested, pages);
    EXPECT_EQ(tested.judge(pages, precision == ValuePrecision::kFp32 ? 1e-5 : 1e-2), "");
  }
}

TEST(AppendKernelsTest, GreedyCodesOfExactInputAreTheHosts) {
  Rng rng(1);
  AppendCase tested = AppendCase::exact(rng, {.num_kv_heads = 2, .head_dim = 64, .num_tokens = 70});
  expect_right_codes(tested, ValuePrecision::kFp32, true);
  expect_right_codes(tested, ValuePrecision::kFp16, false);
}

TEST(AppendKernelsTest, BeamCodesOfExactInputAreTheHosts) {
  Rng rng(2);
  for (const int beam_width : {2, 3, 8, 16}) {
    SCOPED_TRACE(beam_width);
    AppendCase tested = AppendCase::exact(rng, {.num_kv_heads = 1,
                                                .head_dim = 64,
                                                .num_tokens = 11,
                                                .beam_width = beam_width,
                                                .page_size = 16});
    expect_right_codes(tested, ValuePrecision::kFp32, true);
  }
}

TEST(AppendKernelsTest, ShapesOfAllKinds) {
  Rng rng(3);
  const testing_support::AppendShape shapes[] = {
      {.num_kv_heads = 1,
       .head_dim = 128,
       .num_tokens = 9,
       .group_pairs = 4,
       .codebook_size = 7,
       .num_stages = 5,
       .tied = false,
       .beam_width = 2,
       .layout = RopeLayout::kInterleaved,
       .page_size = 32,
       .bits = 2},
      {.num_kv_heads = 1, .head_dim = 256, .num_tokens = 5, .group_pairs = 128},
      {.num_kv_heads = 1,
       .head_dim = 128,
       .num_tokens = 10,
       .num_stages = 7,
       .page_size = 128,
       .plane_bytes = 4 * 16 * 128},
      {.num_kv_heads = 1, .num_tokens = 5, .codebook_size = 200, .num_stages = 2, .tied = false},
      {.num_kv_heads = 1, .num_tokens = 9, .codebook_size = 2, .beam_width = 16},
      {.num_kv_heads = 2,
       .head_dim = 64,
       .num_tokens = 20,
       .group_pairs = 2,
       .codebook_size = 3,
       .num_stages = 3},
  };
  for (const testing_support::AppendShape& shape : shapes) {
    SCOPED_TRACE(&shape - shapes);
    expect_right_codes(AppendCase::exact(rng, shape), ValuePrecision::kFp32, true);
  }
}

TEST(AppendKernelsTest, GreedyByWarpgroups) {
  Rng rng(9);
  testing_support::AppendShape shape{.num_kv_heads = 2,
                                     .head_dim = 128,
                                     .num_tokens = 70,
                                     .codebook_size = 64,
                                     .num_stages = 2,
                                     .hidden_size = 8};
  for (const bool few_blocks : {true, false}) {
    SCOPED_TRACE(few_blocks);
    shape.num_stages = 2;
    shape.weighted = shape.norm_per_head = false;
    expect_right_codes(AppendCase::exact(rng, shape), ValuePrecision::kFp32, few_blocks);
    shape.num_stages = 3;
    shape.weighted = shape.norm_per_head = true;
    expect_right_codes(AppendCase::random(rng, shape), ValuePrecision::kFp32, few_blocks);
  }
  expect_right_codes(AppendCase::exact(rng, {.num_kv_heads = 1,
                                             .head_dim = 256,
                                             .num_tokens = 10,
                                             .codebook_size = 64,
                                             .num_stages = 2,
                                             .hidden_size = 8}),
                     ValuePrecision::kFp32, true);
}

TEST(AppendKernelsTest, BeamsByWarpgroups) {
  Rng rng(10);
  for (const int beam_width : {1, 5, 8}) {
    SCOPED_TRACE(beam_width);
    testing_support::AppendShape shape{.num_kv_heads = 1,
                                       .head_dim = 128,
                                       .num_tokens = 9,
                                       .codebook_size = 64,
                                       .num_stages = 3,
                                       .tied = beam_width == 5,
                                       .beam_width = beam_width,
                                       .hidden_size = 8};
    expect_right_codes(AppendCase::exact(rng, shape), ValuePrecision::kFp32, true);
    shape.num_tokens = 10;
    shape.weighted = shape.norm_per_head = true;
    expect_right_codes(AppendCase::random(rng, shape), ValuePrecision::kFp32, true);
  }
}

TEST(AppendKernelsTest, RealInput) {
  Rng rng(5);
  testing_support::AppendShape shape{
      .num_kv_heads = 1, .head_dim = 128, .num_tokens = 64, .codebook_size = 64, .num_stages = 3};
  expect_right_codes(AppendCase::random(rng, shape), ValuePrecision::kFp16, true);
  shape.beam_width = 4;
  shape.num_tokens = 16;
  expect_right_codes(AppendCase::random(rng, shape), ValuePrecision::kFp32, true);
}

TEST(AppendKernelsTest, WeightedKeysAndPolishedValues) {
  Rng rng(6);
  testing_support::AppendShape shape{.num_kv_heads = 2,
                                     .head_dim = 64,
                                     .num_tokens = 24,
                                     .tied = false,
                                     .weighted = true,
                                     .polish_sweeps = 4};
  expect_right_codes(AppendCase::exact(rng, shape), ValuePrecision::kFp32, true);
  shape.norm_per_head = true;
  shape.beam_width = 4;
  expect_right_codes(AppendCase::random(rng, shape), ValuePrecision::kFp32, true);
  shape.graded_values = true;
  shape.num_kv_heads = 3;  // a number of bits without a kernel of its own
  shape.beam_width = 1;
  expect_right_codes(AppendCase::random(rng, shape), ValuePrecision::kFp32, true);
}

TEST(AppendKernelsTest, ValuesInBlocksAndWithChannelScales) {
  Rng rng(7);
  // Blocks go with binary keys only.
  testing_support::AppendShape shape{.num_kv_heads = 2,
                                     .head_dim = 128,
                                     .num_tokens = 5,
                                     .codebook_size = 2,
                                     .num_stages = 60,
                                     .tied = false,
                                     .polish_sweeps = 3,
                                     .value_blocks = 2};
  expect_right_codes(AppendCase::exact(rng, shape), ValuePrecision::kFp32, true);
  shape.graded = true;
  expect_right_codes(AppendCase::exact(rng, shape), ValuePrecision::kFp32, true);
  shape.graded = false;
  shape.polish_sweeps = 0;
  expect_right_codes(AppendCase::random(rng, shape), ValuePrecision::kFp16, false);
  shape.scaled_values = true;
  expect_right_codes(AppendCase::random(rng, shape), ValuePrecision::kFp32, true);
  expect_right_codes(
      AppendCase::random(rng, {.num_tokens = 9, .num_stages = 1, .scaled_values = true}),
      ValuePrecision::kFp32, true);
}

TEST(AppendKernelsTest, BinaryKeys) {
  Rng rng(8);
  testing_support::AppendShape shape{.num_kv_heads = 2,
                                     .head_dim = 128,
                                     .num_tokens = 19,
                                     .codebook_size = 2,
                                     .num_stages = 60,
                                     .tied = false,
                                     .beam_width = 8,
                                     .hidden_size = 8};
  expect_right_codes(AppendCase::exact(rng, shape), ValuePrecision::kFp32, true);
  shape.norm_per_head = shape.weighted = true;
  shape.num_tokens = 40;
  expect_right_codes(AppendCase::random(rng, shape), ValuePrecision::kFp32, true);
  shape.num_stages = 124;
  shape.num_tokens = 17;
  expect_right_codes(AppendCase::random(rng, shape), ValuePrecision::kFp32, true);
  for (const int beam_width : {1, 3, 6}) {
    SCOPED_TRACE(beam_width);
    shape = {.num_kv_heads = 1,
             .num_tokens = 21,
             .codebook_size = 2,
             .num_stages = 8,
             .tied = beam_width == 3,
             .beam_width = beam_width,
             .layout = RopeLayout::kInterleaved,
             .page_size = 16,
             .hidden_size = 8};
    expect_right_codes(AppendCase::exact(rng, shape), ValuePrecision::kFp32, true);
  }
}

TEST(AppendKernelsTest, LargeTilesAndBlocks) {
  Rng rng(4);
  AppendCase tested = AppendCase::exact(
      rng,
      {.num_kv_heads = 1, .head_dim = 64, .num_tokens = 20, .num_stages = 1, .page_size = 128});
  expect_right_codes(tested, ValuePrecision::kFp16, false);
}

}  // namespace
}  // namespace commvq::cuda
