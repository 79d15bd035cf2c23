#include "engine/parallel.hpp"

#include "commvq/core/parallel_errors.hpp"

#include <omp.h>

namespace engine {

void for_each_task(commvq::Index count, const std::function<void(commvq::Index)>& task) {
  // With two tasks for three threads, one after another wastes less.
  const bool side_by_side = 4 * count >= 3 * omp_get_max_threads();
  commvq::ParallelErrors errors;
#pragma omp parallel for schedule(dynamic) if (side_by_side)
  for (commvq::Index i = 0; i < count; ++i) errors.guard([&] { task(i); });
  errors.rethrow();
}

}  // namespace engine
