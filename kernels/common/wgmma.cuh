#pragma once

#include <cstdint>
#include <type_traits>

/// Products of a warp group, four warps whose first one's number is a multiple of four, in code for
/// sm_90a (wgmma of the PTX ISA). c += a b with a [64][16] fp16 in registers, sixteen rows a warp
/// as in `mma_16x8x16`; b [16][columns] fp16 in shared memory, column-major; c in registers, fp32
/// or fp16, eight columns after the other as in `mma_16x8x16`. The products run asynchronously:
///
///     wgmma_begin();
///     wgmma(c, a, b, false); wgmma(c, a, b, true); ...
///     wgmma_commit();
///     wgmma_wait<0>(c);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define COMMVQ_WGMMA 1
#else
#define COMMVQ_WGMMA 0
#endif

namespace commvq::cuda {

/// Lets the asynchronous units see what this thread wrote to shared memory; before the barrier
/// after which they read it.
__device__ __forceinline__ void show_to_async_units() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

#if COMMVQ_WGMMA

/// Where b lies: matrices of 8 columns x 8 rows, a column's 16 bytes after the other, the next
/// eight rows `row_stride` bytes further and the next eight columns `column_stride`; neither is
/// swizzled. The address must be the same for all threads and, for speed, known to be.
struct WgmmaOperand {
  std::uint32_t low, high;

  __device__ __forceinline__ WgmmaOperand(std::uint32_t address, int row_stride, int column_stride)
      : low(address >> 4 | static_cast<std::uint32_t>(row_stride >> 4) << 16),
        high(static_cast<std::uint32_t>(column_stride >> 4)) {}
  /// Some bytes further.
  __device__ __forceinline__ std::uint64_t at(int offset) const {
    return std::uint64_t{high} << 32 | (low + static_cast<std::uint32_t>(offset >> 4));
  }
};

__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

/// Ends a group of products that `wgmma_wait` counts.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
/// Waits for all groups but the newest `kGroups`, to which `c` does not belong: it may be read
/// then.
template <int kGroups, class T, int kEights, int kNumbers>
__device__ __forceinline__ void wgmma_wait(T (&c)[kEights][kNumbers]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kGroups) : "memory");
#pragma unroll
  for (auto& eight : c)
#pragma unroll
    for (T& number : eight) {
      if constexpr (std::is_same_v<T, float>) {
        asm volatile("" : "+f"(number)::"memory");
      } else {
        asm volatile("" : "+r"(number)::"memory");
      }
    }
}

/// c += a b, or c = a b unless `adds`: then c need not be set. SUMS names those of c, A, B and ADDS
/// the ones after them.
#define COMMVQ_WGMMA_OF(NUMBER, EIGHTS, NUMBERS, INSTRUCTION, SUMS, A, B, ADDS, ...)             \
  __device__ __forceinline__ void wgmma(NUMBER(&c)[EIGHTS][NUMBERS], const std::uint32_t(&a)[4], \
                                        std::uint64_t b, bool adds) {                            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADDS                                        \
                 ", 0;\nwgmma.mma_async.sync.aligned." INSTRUCTION ".f16.f16 {" SUMS "}, {" A    \
                 "}, " B ", p, 1, 1, 0;\n}\n"                                                    \
                 : __VA_ARGS__                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{adds}));          \
  }

#define COMMVQ_EIGHT(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
COMMVQ_WGMMA_OF(float, 2, 4, "m64n16k16.f32", "%0,%1,%2,%3,%4,%5,%6,%7", "%8,%9,%10,%11", "%12",
                "%13", COMMVQ_EIGHT(0), COMMVQ_EIGHT(1))
COMMVQ_WGMMA_OF(float, 4, 4, "m64n32k16.f32",
                "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "%16,%17,%18,%19", "%20",
                "%21", COMMVQ_EIGHT(0), COMMVQ_EIGHT(1), COMMVQ_EIGHT(2), COMMVQ_EIGHT(3))
COMMVQ_WGMMA_OF(
    float, 8, 4, "m64n64k16.f32",
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
    "%24,%25,%26,%27,%28,%29,%30,%31",
    "%32,%33,%34,%35", "%36", "%37", COMMVQ_EIGHT(0), COMMVQ_EIGHT(1), COMMVQ_EIGHT(2),
    COMMVQ_EIGHT(3), COMMVQ_EIGHT(4), COMMVQ_EIGHT(5), COMMVQ_EIGHT(6), COMMVQ_EIGHT(7))
COMMVQ_WGMMA_OF(
    float, 16, 4, "m64n128k16.f32",
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
    "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,"
    "%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63",
    "%64,%65,%66,%67", "%68", "%69", COMMVQ_EIGHT(0), COMMVQ_EIGHT(1), COMMVQ_EIGHT(2),
    COMMVQ_EIGHT(3), COMMVQ_EIGHT(4), COMMVQ_EIGHT(5), COMMVQ_EIGHT(6), COMMVQ_EIGHT(7),
    COMMVQ_EIGHT(8), COMMVQ_EIGHT(9), COMMVQ_EIGHT(10), COMMVQ_EIGHT(11), COMMVQ_EIGHT(12),
    COMMVQ_EIGHT(13), COMMVQ_EIGHT(14), COMMVQ_EIGHT(15))
#undef COMMVQ_EIGHT

// With c in pairs of fp16, of columns 2q and 2q + 1: row g, then row g + 8.
#define COMMVQ_HALF_EIGHT(i) "+r"(c[i][0]), "+r"(c[i][1])
COMMVQ_WGMMA_OF(std::uint32_t, 6, 2, "m64n48k16.f16", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11",
                "%12,%13,%14,%15", "%16", "%17", COMMVQ_HALF_EIGHT(0), COMMVQ_HALF_EIGHT(1),
                COMMVQ_HALF_EIGHT(2), COMMVQ_HALF_EIGHT(3), COMMVQ_HALF_EIGHT(4),
                COMMVQ_HALF_EIGHT(5))
COMMVQ_WGMMA_OF(std::uint32_t, 10, 2, "m64n80k16.f16",
                "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19",
                "%20,%21,%22,%23", "%24", "%25", COMMVQ_HALF_EIGHT(0), COMMVQ_HALF_EIGHT(1),
                COMMVQ_HALF_EIGHT(2), COMMVQ_HALF_EIGHT(3), COMMVQ_HALF_EIGHT(4),
                COMMVQ_HALF_EIGHT(5), COMMVQ_HALF_EIGHT(6), COMMVQ_HALF_EIGHT(7),
                COMMVQ_HALF_EIGHT(8), COMMVQ_HALF_EIGHT(9))
#undef COMMVQ_HALF_EIGHT

#undef COMMVQ_WGMMA_OF

#endif

}  // namespace commvq::cuda
