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

/// The search by warpgroups, where there is one for these codes.
inline KeySearchLaunch warpgroup_search(const EncoderView& encoder) {
  const KeyEncoderView& keys = encoder.keys;
  if (keys.search_stages == nullptr) return {};
  if (keys.beam_width == 1 && keys.books_are_tied)
    return {search_greedy_codes, kWarpgroupSearch.num_rows,
            GreedySearchShared(encoder.layout.num_books).bytes};
  if (keys.books_are_tied)
    return {search_beam_codes<true>, BeamSearchShared<true>::kNumTokens,
            BeamSearchShared<true>(keys.num_stages).bytes};
  return {search_beam_codes<false>, BeamSearchShared<false>::kNumTokens,
          BeamSearchShared<false>(keys.num_stages).bytes};
}

}  // namespace commvq::cuda
