#pragma once

#include "common/bulk_copy.cuh"
#include "load_tokens.cuh"
#include "warpgroup_search.cuh"
#include "write_keys.cuh"

namespace commvq::cuda {

/// Shared memory of a block, offsets in bytes, where a multiprocessor holds kBlocks of them: while
/// one waits, the others have the rest to do. There is memory for the next stage, and there are
/// registers for all of a stage's operands, with two blocks; three are done with more in a time.
template <int kBlocks>
struct GreedySearchShared {
  static constexpr int kStages = kBlocks == 2 ? 2 : 1;       ///< in memory
  static constexpr int kStepsAtOnce = kBlocks == 2 ? 8 : 1;  ///< see `compute_terms`
  /// Stages begin on 1024 bytes, where swizzles do.
  static constexpr int kStageBytes = (SearchStage<true>::kBytes + 1023) / 1024 * 1024;
  static constexpr int kBarriers = kStages * kStageBytes;  ///< Barrier of each SearchStage
  /// uint32 [rows][kSearchTermStride]: terms of a, twice each.
  static constexpr int kTerms = kBarriers + 16;
  /// uint16 [rows][codes_stride].
  static constexpr int kCodes = kTerms + 4 * kWarpgroupSearch.num_rows * kSearchTermStride;
  int codes_stride;
  int bytes;

  COMMVQ_HOST_DEVICE explicit GreedySearchShared(int num_books)
      : codes_stride(num_books | 1), bytes(kCodes + 2 * kWarpgroupSearch.num_rows * codes_stride) {}
};

/// The codes of 64 tokens of one head and group: grid (blocks of tokens, heads, groups).
template <int kBlocks>
__global__ void __launch_bounds__(kWarpgroupSearch.num_threads, kBlocks)
    search_greedy_codes([[maybe_unused]] const __grid_constant__ EncoderView encoder,
                        [[maybe_unused]] Index num_tokens, [[maybe_unused]] const float* unit_keys,
                        [[maybe_unused]] const std::uint16_t* norms,
                        [[maybe_unused]] PagedCodes pages,
                        [[maybe_unused]] const std::int64_t* slot_mapping) {
  if constexpr (append_instructions::kHasWarpgroups) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const KeyEncoderView& keys = encoder.keys;
    const DevicePageLayout& layout = encoder.layout;
    using Shared = GreedySearchShared<kBlocks>;
    const Shared at(layout.num_books);
    const int head = static_cast<int>(blockIdx.y), group = static_cast<int>(blockIdx.z);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int books = (head * layout.num_groups + group) * keys.num_stages;
    const auto copied = [&](int stage) {
      return Barrier(reinterpret_cast<std::uint64_t*>(shared + Shared::kBarriers) +
                     stage % Shared::kStages);
    };
    const auto stage_at = [&](int stage) {
      return shared + stage % Shared::kStages * Shared::kStageBytes;
    };
    const auto start_stage = [&](int stage) {
      if (thread != 0 || stage >= keys.num_stages) return;
      copied(stage).arrive_and_expect(SearchStage<true>::kBytes);
      copy_bytes(stage_at(stage),
                 keys.search_stages + Index{books + stage} * SearchStage<true>::kBytes,
                 SearchStage<true>::kBytes, copied(stage));
    };
    if (thread == 0) {
      for (int i = 0; i < Shared::kStages; ++i) copied(i).init(1);
      publish_barriers();
    }
    __syncthreads();
    for (int i = 0; i < Shared::kStages; ++i) start_stage(i);

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

    auto* const codes = reinterpret_cast<std::uint16_t*>(shared + Shared::kCodes);
    for (int stage = 0; stage < keys.num_stages; ++stage) {
      copied(stage).wait(stage / Shared::kStages % 2);
      const WarpgroupSearch<true> search{
          stage_at(stage),
          reinterpret_cast<std::uint32_t*>(shared + Shared::kTerms) + warp * 16 * kSearchTermStride,
          keys.cross_terms + Index{books + stage} * kSearchSize * kSearchSize,
          keys.search_factor,
          lane,
          keys.num_stages};
      SearchRows terms;
      search.compute_terms<Shared::kStepsAtOnce>(rows, terms);
      std::uint32_t choices[2];
      search.choose(rows, terms, choices);
      search.take_off(choices, rows);
      __syncthreads();  // the stage is no longer read
      start_stage(stage + Shared::kStages);
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
