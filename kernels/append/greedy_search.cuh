#pragma once

#include "common/bulk_copy.cuh"
#include "load_tokens.cuh"
#include "warpgroup_search.cuh"
#include "write_keys.cuh"

namespace commvq::cuda {

/// Shared memory of a block, offsets in bytes. There are two blocks on a multiprocessor: while one
/// waits for products, the other one has the rest to do.
struct GreedySearchShared {
  /// Stages begin on 1024 bytes, where swizzles do.
  static constexpr int kStageBytes = (SearchStage<true>::kBytes + 1023) / 1024 * 1024;
  int stages;    ///< SearchStage [2], one of which is being copied
  int barriers;  ///< Barrier of either stage
  int terms;     ///< uint32 [rows][kSearchTermStride]: terms of a, twice each
  int codes;     ///< uint16 [rows][codes_stride]
  int codes_stride;
  int bytes;

  COMMVQ_HOST_DEVICE explicit GreedySearchShared(int num_books) {
    codes_stride = num_books | 1;
    stages = 0;
    barriers = stages + 2 * kStageBytes;
    terms = barriers + 16;
    codes = terms + 4 * kWarpgroupSearch.num_rows * kSearchTermStride;
    bytes = codes + 2 * kWarpgroupSearch.num_rows * codes_stride;
  }
};

/// The codes of 64 tokens of one head and group: grid (blocks of tokens, heads, groups).
__global__ void __launch_bounds__(kWarpgroupSearch.num_threads, kWarpgroupSearch.min_blocks)
    search_greedy_codes([[maybe_unused]] const __grid_constant__ EncoderView encoder,
                        [[maybe_unused]] Index num_tokens, [[maybe_unused]] const float* unit_keys,
                        [[maybe_unused]] const std::uint16_t* norms,
                        [[maybe_unused]] PagedCodes pages,
                        [[maybe_unused]] const std::int64_t* slot_mapping) {
  if constexpr (append_instructions::kHasWarpgroups) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const KeyEncoderView& keys = encoder.keys;
    const DevicePageLayout& layout = encoder.layout;
    const GreedySearchShared at(layout.num_books);
    const int head = static_cast<int>(blockIdx.y), group = static_cast<int>(blockIdx.z);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const Index books = (Index{head} * layout.num_groups + group) * keys.num_stages;
    const auto copied = [&](int stage) {
      return Barrier(reinterpret_cast<std::uint64_t*>(shared + at.barriers) + stage % 2);
    };
    const auto stage_at = [&](int stage) {
      return shared + at.stages + stage % 2 * GreedySearchShared::kStageBytes;
    };
    const auto start_stage = [&](int stage) {
      if (thread != 0 || stage >= keys.num_stages) return;
      copied(stage).arrive_and_expect(SearchStage<true>::kBytes);
      copy_bytes(stage_at(stage), keys.search_stages + (books + stage) * SearchStage<true>::kBytes,
                 SearchStage<true>::kBytes, copied(stage));
    };
    if (thread == 0) {
      copied(0).init(1);
      copied(1).init(1);
      publish_barriers();
    }
    __syncthreads();
    start_stage(0);
    start_stage(1);

    const Index first_token = Index{blockIdx.x} * kWarpgroupSearch.num_rows;
    const int count =
        static_cast<int>(min(Index{kWarpgroupSearch.num_rows}, num_tokens - first_token));
    SearchRows rows;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int row = warp * 16 + part * 8 + lane / 4;
      const float* const key =
          unit_keys +
          ((first_token + min(row, count - 1)) * layout.num_kv_heads + head) * layout.head_dim;
      load_row(rows, part, key, layout.head_dim, group, keys.residual_scale);
    }

    auto* const codes = reinterpret_cast<std::uint16_t*>(shared + at.codes);
    for (int stage = 0; stage < keys.num_stages; ++stage) {
      copied(stage).wait(stage / 2 % 2);
      const WarpgroupSearch<true> search{
          stage_at(stage),
          reinterpret_cast<std::uint32_t*>(shared + at.terms) + warp * 16 * kSearchTermStride,
          keys.cross_terms + (books + stage) * kSearchSize * kSearchSize, keys.search_factor, lane};
      SearchRows terms;
      search.compute_terms(rows, terms);
      std::uint32_t choices[2];
      search.choose(terms, choices);
      search.take_off(choices, rows);
      __syncthreads();  // the stage is no longer read
      start_stage(stage + 2);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        std::uint16_t* const of_row =
            codes + (warp * 16 + part * 8 + lane / 4) * at.codes_stride + 2 * stage;
        if (lane % 4 < 2)
          of_row[lane % 4] =
              static_cast<std::uint16_t>(lane % 4 == 0 ? a_of(choices[part]) : b_of(choices[part]));
      }
    }
    __syncwarp();  // a row's lanes have all written its codes
    const int own_count = min(count - warp * 16, 16);
    if (own_count <= 0) return;
    write_key_codes(
        layout, head, group, codes + warp * 16 * at.codes_stride, at.codes_stride,
        KeyTargets(layout, head, slot_mapping, norms, first_token + warp * 16, own_count), pages);
  }
}

}  // namespace commvq::cuda
