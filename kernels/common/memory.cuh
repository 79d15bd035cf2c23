#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "commvq/core/float16.hpp"

namespace commvq::cuda {

/// Starts copying 16 bytes from global to shared memory.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(address), "l"(global));
}
/// Waits for all copies that this thread started.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;\n" ::: "memory");
}

__device__ __forceinline__ float bf16_to_float(std::uint16_t bits) {
  return __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
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
