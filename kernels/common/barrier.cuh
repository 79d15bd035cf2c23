#pragma once

#include <cstdint>

namespace commvq::cuda {

/// A barrier in shared memory on which some warps arrive and others wait (mbarrier of the PTX ISA).
/// Its phases are counted from 0; a wait names the phase's parity.
class WarpBarrier {
 public:
  explicit __device__ WarpBarrier(std::uint64_t* memory)
      : address_(static_cast<std::uint32_t>(__cvta_generic_to_shared(memory))) {}

  /// By one thread, before any other use.
  __device__ void init(int warps) const {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;\n" ::"r"(address_), "r"(warps * 32)
                 : "memory");
  }
  /// By all lanes of a warp: what they wrote and read before is done for those who waited.
  __device__ void arrive() const {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}\n" ::"r"(address_)
                 : "memory");
  }
  /// Until the phase of this parity is complete.
  __device__ void wait(int parity) const {
    std::uint32_t done = 0;
    // Later devices let the warp sleep while it waits.
#if __CUDA_ARCH__ >= 900
#define COMMVQ_WAIT "try_wait"
#else
#define COMMVQ_WAIT "test_wait"
#endif
    while (done == 0)
      asm volatile("{\n.reg .pred p;\nmbarrier." COMMVQ_WAIT
                   ".parity.shared.b64 p, [%1], %2;\n"
                   "selp.u32 %0, 1, 0, p;\n}\n"
                   : "=r"(done)
                   : "r"(address_), "r"(parity)
                   : "memory");
#undef COMMVQ_WAIT
  }

 private:
  std::uint32_t address_;
};

}  // namespace commvq::cuda
