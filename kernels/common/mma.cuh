#pragma once

#include <cstdint>

#include <cuda_fp16.h>

namespace commvq::cuda {

/// c += a b with a [16][16] fp16 (row-major fragment), b [16][8] fp16 (column-major fragment) and c
/// [16][8] fp32. Lane 4g + q holds a0 (row g, columns 2q, 2q+1), a1 (row g+8), a2 (row g, columns
/// 2q+8, 2q+9), a3 (row g+8); b0 (rows 2q, 2q+1 of column g), b1 (rows 2q+8, 2q+9); c0, c1 (row g,
/// columns 2q, 2q+1), c2, c3 (row g+8).
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], std::uint32_t a0, std::uint32_t a1,
                                            std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
                                            std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// The same with c in pairs of fp16, of columns 2q and 2q + 1: row g, then row g + 8.
__device__ __forceinline__ void mma_16x8x16(std::uint32_t (&c)[2], std::uint32_t a0,
                                            std::uint32_t a1, std::uint32_t a2, std::uint32_t a3,
                                            std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, "
      "{%0,%1};\n"
      : "+r"(c[0]), "+r"(c[1])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// c += a b with a [16][32] unsigned bytes (row-major fragment), b [32][8] signed bytes
/// (column-major fragment) and c [16][8] integers. Lane 4g + q holds a0 (row g, columns 4q to
/// 4q + 3), a1 (row g + 8), a2 and a3 (columns 4q + 16 and on); b0 (rows 4q to 4q + 3 of column g),
/// b1 (rows 4q + 16 and on); c as above.
__device__ __forceinline__ void mma_16x8x32(int (&c)[4], uint4 a, const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]));
}

/// Four matrices of 8 rows x 16 bytes from shared memory: lane 8 i + j names the address of row j
/// of matrix i, and lane 4 g + q gets word q of row g of every one.
__device__ __forceinline__ uint4 load_matrices(std::uint32_t row_address) {
  uint4 words;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(row_address)
               : "memory");
  return words;
}

__device__ __forceinline__ __half2 as_half2(std::uint32_t bits) {
  return *reinterpret_cast<const __half2*>(&bits);
}
__device__ __forceinline__ std::uint32_t as_bits(__half2 value) {
  return *reinterpret_cast<const std::uint32_t*>(&value);
}

}  // namespace commvq::cuda
