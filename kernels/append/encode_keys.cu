#include <cuda_runtime.h>

#include "beam_search.cuh"
#include "binary_search.cuh"
#include "greedy_search.cuh"
#include "key_search.cuh"
#include "launches.hpp"

namespace commvq::cuda {
namespace {

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

auto binary_search(const KeyEncoderView& keys) {
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
KeySearchLaunch warpgroup_search(const EncoderView& encoder) {
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

}  // namespace

void encode_keys(const EncoderView& encoder, const AppendParams& params,
                 const AppendWorkspace& workspace) noexcept {
  const Index tokens = params.num_tokens;
  if (encoder.keys.binary.num_bytes > 0) {
    const auto kernel = binary_search(encoder.keys);
    const dim3 grid(blocks_for(tokens, kBinarySearch.num_tokens),
                    static_cast<unsigned>(encoder.layout.num_kv_heads));
    kernel<<<grid, kBinarySearch.num_threads,
             static_cast<std::size_t>(BinarySearchShared(encoder.keys).bytes), params.stream>>>(
        encoder, tokens, workspace.unit_keys, workspace.key_norms, params.pages,
        params.slot_mapping);
    return;
  }
  if (const auto by_warpgroups = warpgroup_search(encoder); by_warpgroups.kernel != nullptr) {
    const dim3 grid(blocks_for(tokens, by_warpgroups.num_tokens),
                    static_cast<unsigned>(encoder.layout.num_kv_heads),
                    static_cast<unsigned>(encoder.layout.num_groups));
    by_warpgroups.kernel<<<grid, kWarpgroupSearch.num_threads,
                           static_cast<std::size_t>(by_warpgroups.shared_bytes), params.stream>>>(
        encoder, tokens, workspace.unit_keys, workspace.key_norms, params.pages,
        params.slot_mapping);
    return;
  }
  const int num_rows = encoder.keys.num_search_rows;
  const dim3 grid(blocks_for(tokens, num_rows / encoder.keys.beam_width),
                  static_cast<unsigned>(encoder.layout.num_kv_heads),
                  static_cast<unsigned>(encoder.layout.num_groups));
  const auto kernel = num_rows == kKeySearch.num_rows
                          ? key_search<kKeySearch.num_rows>(search_kind(encoder.keys))
                          : key_search<kKeySearch.num_rows_small>(search_kind(encoder.keys));
  const auto bytes = static_cast<std::size_t>(KeySearchShared(encoder.keys, num_rows).bytes);
  kernel<<<grid, kKeySearch.num_threads, bytes, params.stream>>>(
      encoder, tokens, workspace.unit_keys, workspace.key_norms, params.pages, params.slot_mapping);
}

cudaError_t configure_key_kernels(const EncoderView& encoder, int shared_bytes) noexcept {
  cudaError_t error = warpgroup_search(encoder).shared_bytes > shared_bytes
                          ? cudaErrorInvalidConfiguration
                          : cudaSuccess;
  const auto allow = [&](auto* kernel) {
    if (error == cudaSuccess) error = allow_shared_memory(kernel, shared_bytes);
  };
  for (const KeySearchKind kind :
       {KeySearchKind::kBeam, KeySearchKind::kGreedy, KeySearchKind::kScreenedGreedy}) {
    allow(key_search<kKeySearch.num_rows>(kind));
    allow(key_search<kKeySearch.num_rows_small>(kind));
  }
  allow(search_greedy_codes);
  allow(search_beam_codes<true>);
  allow(search_beam_codes<false>);
  allow(search_binary_codes<1>);
  allow(search_binary_codes<2>);
  return error;
}

}  // namespace commvq::cuda
