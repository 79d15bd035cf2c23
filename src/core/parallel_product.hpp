#pragma once

#include <algorithm>

#include "commvq/core/parallel_errors.hpp"
#include "commvq/core/view.hpp"

#include <Eigen/Core>
#include <omp.h>

namespace commvq::detail {

/// result = left * right, by slabs of columns side by side where that pays and the caller is not in
/// a parallel region. `result` has its size and overlaps neither factor.
///
/// It stands for Eigen's own parallel products, which are switched off: they end the process where
/// memory runs out.
template <class Left, class Right, class Result>
void parallel_product(const Left& left, const Right& right, Result&& result) {
  // Columns of a slab are a multiple of what any of Eigen's kernels takes at a time: so it cuts
  // slabs as it would cut the whole, and the result does not depend on their number.
  constexpr Index kUnit = 48;
  constexpr double kWorthAThread = 5e4;  // multiplications
  const Index cols = right.cols();
  const double work = static_cast<double>(left.rows()) * static_cast<double>(left.cols()) *
                      static_cast<double>(cols);
  const Index threads = omp_in_parallel() ? 1 : omp_get_max_threads();
  const Index parts = std::max(
      Index{1}, std::min({threads, cols / kUnit, static_cast<Index>(work / kWorthAThread)}));
  const Index width = ((cols + parts - 1) / parts + kUnit - 1) / kUnit * kUnit;
  ParallelErrors errors;
#pragma omp parallel for schedule(static) if (parts > 1) num_threads(static_cast <int>(parts))
  for (Index first = 0; first < cols; first += width)
    errors.guard([&] {
      const Index count = std::min(width, cols - first);
      result.middleCols(first, count).noalias() = left * right.middleCols(first, count);
    });
  errors.rethrow();
}

}  // namespace commvq::detail
