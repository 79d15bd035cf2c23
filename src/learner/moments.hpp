#pragma once

#include <functional>

#include "commvq/core/view.hpp"

#include <Eigen/Core>

namespace commvq {

struct Moments {
  Eigen::RowVectorXd mean;
  Eigen::MatrixXd covariance;
};

/// Of `size` vectors of `width` numbers, which `read` gives in rows, some at a time.
Moments moments_of(Index size, Index width,
                   const std::function<Eigen::MatrixXd(Index first, Index count)>& read);

}  // namespace commvq
