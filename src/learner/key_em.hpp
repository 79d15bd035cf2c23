#pragma once

#include <functional>

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

/// Residuals `[size][width]` that are made where they are needed, so that they need not all be in
/// memory: `read` fills the rows it is given with those from `first` on. It is called by several
/// threads at once.
struct Residuals {
  Index size;
  Index width;
  std::function<void(Index first, Matrix& rows)> read;
};

/// Those of a matrix, which must outlive the result.
inline Residuals residuals_of(const Matrix& matrix) {
  return {matrix.rows(), matrix.cols(),
          [&matrix](Index first, Matrix& rows) { rows = matrix.middleRows(first, rows.rows()); }};
}

/// E step. Residuals have width 2g, `books` is `[2 Nc][2g]`, both planar:
/// p(A, B | x) = softmax of -|x - Z_0[A] - Z_1[B]|^2 / temperature. Assignments of `batch_tokens`
/// residuals are in memory at once. Sums are made in a fixed order, whatever the threads.
Statistics soft_assign(const Residuals& residuals, const Matrix& books, double temperature,
                       Index batch_tokens);

/// M step: the books that minimise the sum of w_AB |mu_AB - Z_0[A] - Z_1[B]|^2, with a slight pull
/// to `books` for directions that no residual determines. Tied books stay tied, Z_1 = j Z_0.
Matrix solve_books(const Statistics& statistics, const Matrix& books, bool tied);

/// Finds every residual's nearest centre (A, B): codes[t * codes_stride] receives A, the next one
/// B.
void find_nearest(const Residuals& residuals, const Matrix& books, std::uint16_t* codes,
                  Index codes_stride);

/// The second half of tied books: j times the first, (re, im) -> (-im, re).
void tie(Matrix& books);

}  // namespace commvq::key_em
