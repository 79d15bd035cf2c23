#pragma once

#include "beam_search.cuh"
#include "binary_search.cuh"
#include "greedy_search.cuh"
#include "key_search.cuh"

// Which kernel searches for a codec's key codes.
namespace commvq::cuda {

/// The search for any codes, kNumRows rows a block.
template <int kNumRows>
auto key_search(KeySearchKind kind) {
  switch (kind) {
    case KeySearchKind::kBeam:
      return search_key_codes<KeySearchKind::kBeam, kNumRows>;
    case KeySearchKind::kGreedy:
      return search_key_codes<KeySearchKind::kGreedy, kNumRows>;
    default:
      return search_key_codes<KeySearchKind::kScreenedGreedy, kNumRows>;
  }
}

/// The search for codes that have `BinarySearchView`.
inline auto binary_search(const KeyEncoderView& keys) {
  return keys.binary.num_bytes <= 16 ? search_binary_codes<1> : search_binary_codes<2>;
}

using SearchKernel = void(EncoderView, Index, const float*, const std::uint16_t*, PagedCodes,
                          const std::int64_t*);

/// A search for key codes and what a block of it takes.
struct KeySearchLaunch {
  SearchKernel* kernel = nullptr;  ///< null: none
  int num_tokens = 0;
  int shared_bytes = 0;
};

/// The search by warpgroups for so many tokens' codes, where there is one for these codes.
inline KeySearchLaunch warpgroup_search(const EncoderView& encoder, Index num_tokens) {
  const KeyEncoderView& keys = encoder.keys;
  if (keys.search_stages == nullptr) return {};
  if (keys.beam_width == 1 && keys.books_are_tied) {
    constexpr int kRows = kWarpgroupSearch.num_rows;
    const DevicePageLayout& layout = encoder.layout;
    const Index blocks = (num_tokens + kRows - 1) / kRows * layout.num_kv_heads * layout.num_groups;
    // Three on a multiprocessor take longer than two, but do more in a time: for many blocks.
    if (blocks <= 6 * encoder.warpgroup_processors)
      return {search_greedy_codes<2>, kRows, GreedySearchShared<2>(layout.num_books).bytes};
    return {search_greedy_codes<3>, kRows, GreedySearchShared<3>(layout.num_books).bytes};
  }
  if (keys.books_are_tied)
    return {search_beam_codes<true>, BeamSearchShared<true>::kNumTokens,
            BeamSearchShared<true>(keys.num_stages).bytes};
  return {search_beam_codes<false>, BeamSearchShared<false>::kNumTokens,
          BeamSearchShared<false>(keys.num_stages).bytes};
}

}  // namespace commvq::cuda
