// Copies by the copy engine. A host emulation may stand in for this file by defining its guard.
#ifndef COMMVQ_BULK_COPY_CUH
#define COMMVQ_BULK_COPY_CUH

#include <cstdint>

#include <cuda.h>

namespace commvq::cuda {

/// A barrier in shared memory that also counts the bytes of bulk copies (mbarrier of the PTX ISA),
/// on devices of compute capability 9.0 and later. Its phases are counted from 0; a wait names the
/// phase's parity.
class CopyBarrier {
 public:
  explicit __device__ CopyBarrier(std::uint64_t* memory)
      : address_(static_cast<std::uint32_t>(__cvta_generic_to_shared(memory))) {}

  std::uint32_t __device__ address() const { return address_; }

  /// By one thread, before any other use; `publish_barriers` and a barrier of the block follow.
  __device__ void init(int arrivals) const {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;\n" ::"r"(address_), "r"(arrivals) : "memory");
  }
  __device__ void arrive() const {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}\n" ::"r"(address_)
                 : "memory");
  }
  /// Arrives; the phase also ends no sooner than `bytes` have been copied.
  __device__ void arrive_and_expect(int bytes) const {
    asm volatile(
        "{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}\n" ::"r"(
            address_),
        "r"(bytes)
        : "memory");
  }
  /// Until the phase of this parity is complete.
  __device__ void wait(int parity) const {
    std::uint32_t done = 0;
    while (done == 0)
      asm volatile(
          "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n}\n"
          : "=r"(done)
          : "r"(address_), "r"(parity)
          : "memory");
  }

 private:
  std::uint32_t address_;
};

/// Lets the copy engine see barriers that this thread initialised.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::
                   : "memory");
}

/// Starts copying `bytes` from global memory, a multiple of 16, both on 16 bytes; `barrier` counts
/// them. By one thread.
__device__ __forceinline__ void copy_bytes(void* shared, const void* global, int bytes,
                                           const CopyBarrier& barrier) {
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
                                         int block, const CopyBarrier& barrier) {
  const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];\n" ::"r"(to),
      "l"(&map), "r"(input), "r"(row), "r"(block), "r"(barrier.address())
      : "memory");
}

}  // namespace commvq::cuda

#endif  // COMMVQ_BULK_COPY_CUH
