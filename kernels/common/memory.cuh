#pragma once

#include <cstdint>

#include "commvq/core/float16.hpp"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace commvq::cuda {

/// Starts copying 16 bytes from global to shared memory.
__device__ __forceinline__ void copy_async_16(std::uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared), "l"(global));
}
/// The same of 4 bytes.
__device__ __forceinline__ void copy_async_4(std::uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(shared), "l"(global));
}
/// Waits for all copies that this thread started.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;\n" ::: "memory");
}

/// Ends a group of copies that `wait_for_copies_but` counts.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;\n");
}
/// Waits for all of this thread's groups but the newest `kGroups`.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies_but() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroups) : "memory");
}
__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

/// 16 bytes at a shared-memory address plus a constant.
template <int kOffset>
__device__ __forceinline__ uint4 load_shared_16(std::uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address), "n"(kOffset));
  return v;
}

__device__ __forceinline__ float bf16_to_float(std::uint16_t bits) {
  return __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
}
/// The two bf16 numbers of a word.
__device__ __forceinline__ float2 bf16_to_floats(std::uint32_t two) {
  return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u));
}

/// 2^x to 2 units in the last place; results below the normal range become 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

/// Base-2 logarithm of a number in the normal range, to about 2^-22.
__device__ __forceinline__ float log2_approx(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

/// Element `i` of an array of bf16 or fp16.
__device__ __forceinline__ float load_float(const void* data, FloatType type, Index i) {
  if (type == FloatType::kBf16) return bf16_to_float(static_cast<const std::uint16_t*>(data)[i]);
  return __half2float(static_cast<const __half*>(data)[i]);
}
__device__ __forceinline__ void store_float(void* data, FloatType type, Index i, float value) {
  if (type == FloatType::kBf16) {
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(value);
  } else {
    static_cast<__half*>(data)[i] = __float2half(value);
  }
}

}  // namespace commvq::cuda
