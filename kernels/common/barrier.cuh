#pragma once

#include <cstdint>

namespace commvq::cuda {

/// A barrier in shared memory on which some threads arrive and others wait, and which may count the
/// bytes of copies (mbarrier of the PTX ISA). Its phases are counted from 0; a wait names the
/// phase's parity.
class Barrier {
 public:
  explicit __device__ Barrier(std::uint64_t* memory)
      : address_(static_cast<std::uint32_t>(__cvta_generic_to_shared(memory))) {}

  std::uint32_t __device__ address() const { return address_; }

  /// By one thread, before any other use: so many threads arrive in a phase. For bulk copies
  /// `publish_barriers` follows; then a barrier of the block. The memory serves nothing else
  /// afterwards: a device that returns from another process's work may write the barrier back.
  __device__ void init(int arrivals) const {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;\n" ::"r"(address_), "r"(arrivals) : "memory");
  }
  /// What this thread wrote and read before is done for those who waited.
  __device__ void arrive() const {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}\n" ::"r"(address_)
                 : "memory");
  }
  /// Arrives once what this thread copied asynchronously by `copy_async_16` so far is there.
  __device__ void arrive_after_copies() const {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];\n" ::"r"(address_) : "memory");
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
