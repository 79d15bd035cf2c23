// The instructions that `append` needs beyond CUDA C++. A host emulation may stand in for this file
// by defining its guard.
#ifndef COMMVQ_APPEND_INSTRUCTIONS_CUH
#define COMMVQ_APPEND_INSTRUCTIONS_CUH

#include <cuda_fp16.h>

#include <cstdint>

namespace commvq::cuda::append_instructions {

/// Rounds to the nearest fp16, ties to even.
__device__ __forceinline__ std::uint16_t to_half(float value) {
  return __half_as_ushort(__float2half_rn(value));
}
__device__ __forceinline__ float from_half(std::uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

/// Starts copying 16 bytes from global to shared memory; writes zeros instead if `valid` is false.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global),
               "r"(bytes));
}
/// Closes a group of the copies that this thread started.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n"); }
/// Waits until at most `kPending` of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

/// Four 8x8 matrices of fp16: lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(std::uint32_t (&to)[4], const void* shared_row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

/// c += a b: a [16][16] fp16, b [16][8] fp16, c [16][8] fp32. Lane 4g + q holds of a: row g columns
/// 2q, 2q+1; row g+8; row g columns 2q+8, 2q+9; row g+8. Of b: rows 2q, 2q+1 of column g; rows
/// 2q+8, 2q+9. Of c: row g columns 2q, 2q+1; row g+8.
__device__ __forceinline__ void multiply_add(float (&c)[4], const std::uint32_t (&a)[4],
                                             std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Whether the device adds and compares pairs of 16-bit integers in one instruction.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool kHasPackedIntegers = false;
#else
inline constexpr bool kHasPackedIntegers = true;
#endif
/// min(a + b, c) of pairs of 16-bit integers.
__device__ __forceinline__ std::uint32_t add_min_pairs(std::uint32_t a, std::uint32_t b,
                                                       std::uint32_t c) {
  return __viaddmin_s16x2(a, b, c);
}

}  // namespace commvq::cuda::append_instructions

#endif  // COMMVQ_APPEND_INSTRUCTIONS_CUH
