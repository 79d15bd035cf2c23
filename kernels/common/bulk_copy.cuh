// Copies by the copy engine. A host emulation may stand in for this file by defining its guard.
#ifndef COMMVQ_BULK_COPY_CUH
#define COMMVQ_BULK_COPY_CUH

#include <cstdint>

#include "common/barrier.cuh"

#include <cuda.h>

namespace commvq::cuda {

/// Lets the copy engine see barriers that this thread initialised.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::
                   : "memory");
}

/// Starts copying `bytes` from global memory, a multiple of 16, both on 16 bytes; `barrier` counts
/// them. By one thread.
__device__ __forceinline__ void copy_bytes(void* shared, const void* global, int bytes,
                                           const Barrier& barrier) {
  const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(to),
      "l"(global), "r"(bytes), "r"(barrier.address())
      : "memory");
}

/// Starts copying a map's box that begins at (input, row, block); `barrier` counts its bytes. By
/// one thread.
__device__ __forceinline__ void copy_box(void* shared, const CUtensorMap& map, int input, int row,
                                         int block, const Barrier& barrier) {
  const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];\n" ::"r"(to),
      "l"(&map), "r"(input), "r"(row), "r"(block), "r"(barrier.address())
      : "memory");
}

}  // namespace commvq::cuda

#endif  // COMMVQ_BULK_COPY_CUH
