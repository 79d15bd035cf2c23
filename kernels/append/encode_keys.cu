#include <cuda_runtime.h>

#include "key_searches.cuh"
#include "launches.hpp"

namespace commvq::cuda {
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
  if (const auto by_warpgroups = warpgroup_search(encoder, tokens);
      by_warpgroups.kernel != nullptr) {
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
  cudaError_t error = cudaSuccess;
  for (const Index tokens : {Index{1}, Index{kMaxTokens}})
    if (warpgroup_search(encoder, tokens).shared_bytes > shared_bytes)
      error = cudaErrorInvalidConfiguration;
  const auto allow = [&](auto* kernel) {
    if (error == cudaSuccess) error = allow_shared_memory(kernel, shared_bytes);
  };
  for (const KeySearchKind kind :
       {KeySearchKind::kBeam, KeySearchKind::kGreedy, KeySearchKind::kScreenedGreedy}) {
    allow(key_search<kKeySearch.num_rows>(kind));
    allow(key_search<kKeySearch.num_rows_small>(kind));
  }
  allow(search_greedy_codes<2>);
  allow(search_greedy_codes<3>);
  allow(search_beam_codes<true>);
  allow(search_beam_codes<false>);
  allow(search_binary_codes<1>);
  allow(search_binary_codes<2>);
  return error;
}

}  // namespace commvq::cuda
