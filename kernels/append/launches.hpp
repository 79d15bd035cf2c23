#pragma once

#include <cuda_runtime_api.h>

#include "encoder_view.hpp"

namespace commvq::cuda {

// The parts of `append`. They enqueue kernels on params.stream; errors are left to
// cudaGetLastError.

/// Key codes to the pages, from what is loaded in the workspace.
void encode_keys(const EncoderView& encoder, const AppendParams& params,
                 const AppendWorkspace& workspace) noexcept;
/// Value codes and scales likewise.
void encode_values(const EncoderView& encoder, const AppendParams& params,
                   const AppendWorkspace& workspace) noexcept;

/// Let the kernels use all the shared memory that a block of the current device may have,
/// `shared_bytes`.
cudaError_t configure_value_kernels(const EncoderView& encoder, int shared_bytes) noexcept;
cudaError_t configure_key_kernels(const EncoderView& encoder, int shared_bytes) noexcept;

template <class Kernel>
cudaError_t allow_shared_memory(Kernel* kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

inline unsigned blocks_for(Index count, Index per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

}  // namespace commvq::cuda
