#pragma once

// Counts what a program takes from the heap, and lets allocations fail, by functions that stand
// before glibc's. For one source file of a program; with glibc and without sanitizers only.

#include <cstdlib>

#include "reference/instrumented.hpp"

#if defined(__GLIBC__) && !COMMVQ_INSTRUMENTED
#define COMMVQ_COUNTS_HEAP

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>

#include <link.h>
#include <malloc.h>

namespace heap {

inline std::atomic<std::int64_t> live_bytes{0};
inline std::atomic<std::int64_t> peak_bytes{0};
/// One allocation fails after so many more succeeded; negative: none.
inline std::atomic<std::int64_t> allocations_until_failure{-1};

struct Code {
  std::uintptr_t begin = 0, end = 0;
};

/// The OpenMP runtime, which ends the process where memory for its own threads runs out.
inline const Code runtime = [] {
  Code code;
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* result) {
        if (std::strstr(info->dlpi_name, "omp") == nullptr) return 0;
        for (int i = 0; i < info->dlpi_phnum; ++i)
          if ((info->dlpi_phdr[i].p_flags & PF_X) != 0) {
            const std::uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            *static_cast<Code*>(result) = {begin, begin + info->dlpi_phdr[i].p_memsz};
          }
        return 1;
      },
      &code);
  return code;
}();

/// Whether the allocation that returns to `caller` shall fail.
inline bool fails(void* caller) {
  if (allocations_until_failure < 0) return false;
  const auto address = reinterpret_cast<std::uintptr_t>(caller);
  if (address >= runtime.begin && address < runtime.end) return false;
  return allocations_until_failure-- == 0;
}

inline void* count(void* block) {
  const std::int64_t live = live_bytes += static_cast<std::int64_t>(malloc_usable_size(block));
  std::int64_t peak = peak_bytes;
  while (peak < live && !peak_bytes.compare_exchange_weak(peak, live)) {
  }
  return block;
}
inline void discount(void* block) {
  live_bytes -= static_cast<std::int64_t>(malloc_usable_size(block));
}

}  // namespace heap

extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
void __libc_free(void*);

void* malloc(std::size_t size) {
  if (heap::fails(__builtin_return_address(0))) return nullptr;
  return heap::count(__libc_malloc(size));
}
void* calloc(std::size_t number, std::size_t size) {
  if (heap::fails(__builtin_return_address(0))) return nullptr;
  return heap::count(__libc_calloc(number, size));
}
void* realloc(void* block, std::size_t size) {
  if (heap::fails(__builtin_return_address(0))) return nullptr;
  heap::discount(block);
  return heap::count(__libc_realloc(block, size));
}
void* memalign(std::size_t alignment, std::size_t size) {
  if (heap::fails(__builtin_return_address(0))) return nullptr;
  return heap::count(__libc_memalign(alignment, size));
}
void* aligned_alloc(std::size_t alignment, std::size_t size) {
  if (heap::fails(__builtin_return_address(0))) return nullptr;
  return heap::count(__libc_memalign(alignment, size));
}
int posix_memalign(void** block, std::size_t alignment, std::size_t size) {
  if (heap::fails(__builtin_return_address(0))) return ENOMEM;
  *block = heap::count(__libc_memalign(alignment, size));
  return *block == nullptr ? ENOMEM : 0;
}
void free(void* block) {
  heap::discount(block);
  __libc_free(block);
}
}

#endif
