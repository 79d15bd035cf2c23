#pragma once

#include "commvq/core/view.hpp"

#include <Eigen/Core>

/// One stage of the key learner: soft assignment of residuals to the Nc^2 centres
/// c_AB = Z_0[A] + Z_1[B], and the least squares that follow (CommVQ, section 3.3).
namespace commvq::key_em {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// What the M step needs of the soft assignment p(A, B | x), summed over all residuals x.
struct Statistics {
  double squared_error = 0;      ///< of the hard assignment, summed
  Eigen::MatrixXd pair_weights;  ///< [Nc][Nc]: w_AB, the sum of p(A, B | x)
  Eigen::MatrixXd sums;          ///< [2 Nc][2g]: sums of p(A | x) x, then of p(B | x) x
};

/// E step. `residuals` is `[tokens][2g]`, `books` `[2 Nc][2g]`, both planar:
/// p(A, B | x) = softmax of -|x - Z_0[A] - Z_1[B]|^2 / temperature. Assignments of `batch_tokens`
/// residuals are in memory at once. Sums are made in a fixed order, whatever the threads.
Statistics soft_assign(const Matrix& residuals, const Matrix& books, double temperature,
                       Index batch_tokens);

/// M step: the books that minimise the sum of w_AB |mu_AB - Z_0[A] - Z_1[B]|^2, with a slight pull
/// to `books` for directions that no residual determines. Tied books stay tied, Z_1 = j Z_0.
Matrix solve_books(const Statistics& statistics, const Matrix& books, bool tied);

/// Subtracts from every residual its nearest centre.
void subtract_nearest(Matrix& residuals, const Matrix& books);

/// The second half of tied books: j times the first, (re, im) -> (-im, re).
void tie(Matrix& books);

}  // namespace commvq::key_em
