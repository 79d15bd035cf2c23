#pragma once

#include "learner/key_work.hpp"

/// Books of graded codes (see `KeyCodecConfig::graded`) as what they are made of: of a group, a
/// centre c and a direction e_n for each number n,
///
///     kappa ~ c + sum over books k of  (b_k - share_k) weight_k e_n(k),
///
/// where b_k is the code of book k, 0 or 1. The centre stands in the rows of book 0. With shares of
/// the keys that have the bit, every row of another book is 0 on average: what the first stages
/// leave is centred, as the search, which goes from stage to stage, needs it.
namespace commvq::graded_books {

/// Sets the rows of a group from mean and covariance of the keys: see graded_directions.
void initialize(KeyWork& keys, int group, KeyCodebook<float>& codebook);

/// `[books]`: share of the keys whose bit is set.
Eigen::VectorXd shares_of(const Occurrences& keys);

/// `[rows][1 + numbers]`: the matrix A of rows = A * parameters, where the parameters are the
/// centre and the directions, `[1 + numbers][2g]`.
Eigen::MatrixXd tie_of(const Eigen::VectorXd& shares);

/// The parameters of a group's rows.
Eigen::MatrixXd parameters_of(const KeyCodebook<float>& codebook, int group,
                              const Eigen::VectorXd& shares);

}  // namespace commvq::graded_books
