#include "engine/parallel.hpp"

#include <exception>

#include <omp.h>

namespace engine {

void for_each_task(commvq::Index count, const std::function<void(commvq::Index)>& task) {
  // With two tasks for three threads, one after another wastes less.
  const bool side_by_side = 4 * count >= 3 * omp_get_max_threads();
  std::exception_ptr error;
#pragma omp parallel for schedule(dynamic) if (side_by_side)
  for (commvq::Index i = 0; i < count; ++i) {
    try {
      task(i);
    } catch (...) {
#pragma omp critical(engine_task_error)
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace engine
