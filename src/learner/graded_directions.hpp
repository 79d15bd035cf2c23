#pragma once

#include <Eigen/Core>

namespace commvq {

/// `[numbers][width]`: the vectors that the numbers of a graded code multiply, to begin with, for
/// vectors of this covariance `[width][width]`. Each number takes the strongest direction that is
/// left, those of three bits first, then those of two, then those of one. What a number leaves of a
/// direction, as of a normal distribution, may be taken again.
Eigen::MatrixXd graded_directions(const Eigen::MatrixXd& covariance, int num_numbers);

}  // namespace commvq
