#pragma once

#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>

// Parts of the sanitizers' runtime; null where a program is built without one.
extern "C" {
__attribute__((weak)) int __sanitizer_install_malloc_and_free_hooks(
    void (*on_malloc)(const volatile void*, std::size_t), void (*on_free)(const volatile void*));
__attribute__((weak)) std::size_t __sanitizer_get_allocated_size(const volatile void*);
}

namespace commvq::fuzz {

/// Counts what is allocated during its life, by any thread and any library, and ends the process at
/// the allocation that would exceed `limit` bytes held at once. Needs AddressSanitizer, and counts
/// nothing without. One at a time.
class MemoryMeter {
 public:
  explicit MemoryMeter(std::size_t limit) {
    static const bool installed = install();
    limit_ = static_cast<std::ptrdiff_t>(limit);
    held_ = 0;
    active_ = installed;
  }
  ~MemoryMeter() { active_ = false; }
  MemoryMeter(const MemoryMeter&) = delete;
  MemoryMeter& operator=(const MemoryMeter&) = delete;

  static bool counts() { return &__sanitizer_install_malloc_and_free_hooks != nullptr; }

 private:
  static bool install() {
    return counts() && __sanitizer_install_malloc_and_free_hooks(&on_malloc, &on_free) != 0;
  }

  static void on_malloc(const volatile void*, std::size_t size) {
    if (!active_) return;
    const auto bytes = static_cast<std::ptrdiff_t>(size);
    const std::ptrdiff_t held = held_.fetch_add(bytes) + bytes;
    if (held <= limit_) return;
    active_ = false;  // what follows allocates, too
    std::fprintf(stderr, "FINDING: %td bytes held at once; this input may take %td\n", held,
                 limit_.load());
    std::abort();
  }
  static void on_free(const volatile void* memory) {
    if (active_ && memory != nullptr)
      held_ -= static_cast<std::ptrdiff_t>(__sanitizer_get_allocated_size(memory));
  }

  inline static std::atomic<bool> active_{false};
  inline static std::atomic<std::ptrdiff_t> held_{0};
  inline static std::atomic<std::ptrdiff_t> limit_{0};
};

}  // namespace commvq::fuzz
