#pragma once

#include <atomic>
#include <exception>

namespace commvq {

/// Brings an exception out of an OpenMP region: one that leaves a region by itself ends the
/// process.
///
///     ParallelErrors errors;
///     #pragma omp parallel for
///     for (Index i = 0; i < count; ++i) errors.guard([&] { work(i); });
///     errors.rethrow();
///
/// The first exception is kept; work that has not begun by then is left out.
class ParallelErrors {
 public:
  /// Runs `work`, unless something was thrown before. Any number of threads may call at once.
  template <class Work>
  void guard(Work&& work) noexcept {
    if (thrown_.load(std::memory_order_relaxed)) return;
    try {
      work();
    } catch (...) {
      if (!thrown_.exchange(true)) first_ = std::current_exception();
    }
  }

  /// Throws what was kept. For the thread that opened the region, after it.
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::atomic<bool> thrown_{false};
  std::exception_ptr first_;
};

}  // namespace commvq
