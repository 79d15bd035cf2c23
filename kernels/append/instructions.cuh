// The instructions that `append` needs beyond CUDA C++. A host emulation may stand in for this file
// by defining its guard.
#ifndef COMMVQ_APPEND_INSTRUCTIONS_CUH
#define COMMVQ_APPEND_INSTRUCTIONS_CUH

#include <cstdint>

#include <cuda_fp16.h>

namespace commvq::cuda::append_instructions {

/// Rounds to the nearest fp16, ties to even.
__device__ __forceinline__ std::uint16_t to_half(float value) {
  return __half_as_ushort(__float2half_rn(value));
}
__device__ __forceinline__ float from_half(std::uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

/// To about 2^-22 of the result; less than fp32's least normal number is 0.
__device__ __forceinline__ float fast_exp2(float x) {
  float result = 0;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float result = 0;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

/// Starts copying 16 bytes from global to shared memory; writes zeros instead if `valid` is false.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global),
               "r"(bytes));
}
/// Closes a group of the copies that this thread started.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;\n");
}
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

// The matrix unit of a warpgroup is there only in code for sm_90a.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// Descriptor of an operand in shared memory: rows of 128 bytes along the inputs, 16-byte piece p
/// of row r at piece p ^ (r % 8), beginning on 1024 bytes (plus the offset along the inputs).
__device__ __forceinline__ std::uint64_t operand_descriptor(const void* shared) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  constexpr std::uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | std::uint64_t{1} << 16 | kEightRows << 32 | kSwizzle128 << 62;
}
/// The descriptor of what begins so many bytes, a multiple of 16, further.
__device__ __forceinline__ std::uint64_t advanced(std::uint64_t descriptor, int bytes) {
  return descriptor + static_cast<std::uint64_t>(bytes >> 4);
}
/// Registers of the warpgroup's threads from here on; `kCount` is a multiple of 8.
template <int kCount>
__device__ __forceinline__ void give_registers_up() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
}
__device__ __forceinline__ void begin_warpgroup_products() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void commit_warpgroup_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_for_warpgroup_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}
/// c += a b: a [64][16], b [16][256] by their descriptors; warp w of the four holds rows 16 w to
/// 16 w + 15 of c, in pieces of eight columns as `multiply_add` does.
__device__ __forceinline__ void warpgroup_multiply_add(float (&c)[32][4], std::uint64_t a,
                                                       std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
      "%127}, "
      "%128, %129, 1, 1, 1, 0, 0;\n"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),
        "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),
        "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]),
        "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
        "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]),
        "+f"(c[7][2]), "+f"(c[7][3]), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3]),
        "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]), "+f"(c[10][0]), "+f"(c[10][1]),
        "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]),
        "+f"(c[11][3]), "+f"(c[12][0]), "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3]),
        "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3]), "+f"(c[14][0]),
        "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]), "+f"(c[15][0]), "+f"(c[15][1]),
        "+f"(c[15][2]), "+f"(c[15][3]), "+f"(c[16][0]), "+f"(c[16][1]), "+f"(c[16][2]),
        "+f"(c[16][3]), "+f"(c[17][0]), "+f"(c[17][1]), "+f"(c[17][2]), "+f"(c[17][3]),
        "+f"(c[18][0]), "+f"(c[18][1]), "+f"(c[18][2]), "+f"(c[18][3]), "+f"(c[19][0]),
        "+f"(c[19][1]), "+f"(c[19][2]), "+f"(c[19][3]), "+f"(c[20][0]), "+f"(c[20][1]),
        "+f"(c[20][2]), "+f"(c[20][3]), "+f"(c[21][0]), "+f"(c[21][1]), "+f"(c[21][2]),
        "+f"(c[21][3]), "+f"(c[22][0]), "+f"(c[22][1]), "+f"(c[22][2]), "+f"(c[22][3]),
        "+f"(c[23][0]), "+f"(c[23][1]), "+f"(c[23][2]), "+f"(c[23][3]), "+f"(c[24][0]),
        "+f"(c[24][1]), "+f"(c[24][2]), "+f"(c[24][3]), "+f"(c[25][0]), "+f"(c[25][1]),
        "+f"(c[25][2]), "+f"(c[25][3]), "+f"(c[26][0]), "+f"(c[26][1]), "+f"(c[26][2]),
        "+f"(c[26][3]), "+f"(c[27][0]), "+f"(c[27][1]), "+f"(c[27][2]), "+f"(c[27][3]),
        "+f"(c[28][0]), "+f"(c[28][1]), "+f"(c[28][2]), "+f"(c[28][3]), "+f"(c[29][0]),
        "+f"(c[29][1]), "+f"(c[29][2]), "+f"(c[29][3]), "+f"(c[30][0]), "+f"(c[30][1]),
        "+f"(c[30][2]), "+f"(c[30][3]), "+f"(c[31][0]), "+f"(c[31][1]), "+f"(c[31][2]),
        "+f"(c[31][3])
      : "l"(a), "l"(b));
}
/// c += kSign a b: a [16][16] of each warp in registers as in `multiply_add`, b [16][64] in shared
/// memory by its `operand_descriptor`, as 64 rows of 16 numbers each or, with kTransposed 1, as 16
/// rows of 64; kSign is 1 or -1. Asynchronous; neither operand must change before
/// `finish_warpgroup_products`.
template <int kSign, int kTransposed>
__device__ __forceinline__ void warpgroup_multiply_add(float (&c)[8][4],
                                                       const std::uint32_t (&a)[4],
                                                       std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, 1, %37, 1, %38;\n"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),
        "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),
        "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]),
        "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
        "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]),
        "+f"(c[7][2]), "+f"(c[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kSign), "n"(kTransposed));
}
/// What was written to `c` before is there when products begin, and not read before they are done.
template <int kCount>
__device__ __forceinline__ void settle_sums(float (&c)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])::"memory");
}
/// Waits for all products, those of `c` among them.
template <int kCount>
__device__ __forceinline__ void finish_warpgroup_products(float (&c)[kCount][4]) {
  wait_for_warpgroup_products<0>();
  settle_sums(c);
}
/// Keeps the compiler from computing what follows earlier, which takes registers: it ends the
/// kernel if `never` holds, which must not be, nor follow from what else the compiler knows.
__device__ __forceinline__ void compute_no_sooner(bool never) {
  if (never) __trap();
}
inline constexpr bool kHasWarpgroups = true;
#else
// Never called: for code that is only parsed.
inline constexpr bool kHasWarpgroups = false;
__device__ __forceinline__ void begin_warpgroup_products() {}
__device__ __forceinline__ void commit_warpgroup_products() {}
template <int kCount>
__device__ __forceinline__ void settle_sums(float (&)[kCount][4]) {}
template <int kCount>
__device__ __forceinline__ void finish_warpgroup_products(float (&)[kCount][4]) {}
__device__ __forceinline__ void compute_no_sooner(bool) {}
template <int kSign, int kTransposed>
__device__ __forceinline__ void warpgroup_multiply_add(float (&)[8][4], const std::uint32_t (&)[4],
                                                       std::uint64_t) {}
__device__ __forceinline__ std::uint64_t operand_descriptor(const void*) {
  return 0;
}
__device__ __forceinline__ std::uint64_t advanced(std::uint64_t descriptor, int) {
  return descriptor;
}
#endif

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
/// max(a + b, c) likewise.
__device__ __forceinline__ std::uint32_t add_max_pairs(std::uint32_t a, std::uint32_t b,
                                                       std::uint32_t c) {
  return __viaddmax_s16x2(a, b, c);
}

}  // namespace commvq::cuda::append_instructions

#endif  // COMMVQ_APPEND_INSTRUCTIONS_CUH
