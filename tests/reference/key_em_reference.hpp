#pragma once

#include <cmath>
#include <vector>

#include <Eigen/Dense>

/// One EM step of a stage in double precision, straight from the paper's section 3.3: all Nc^2
/// centres, all their weights.
namespace commvq::reference {

using ComplexMatrix = Eigen::MatrixXcd;

/// Planar rows `[re][im]` as complex ones.
inline ComplexMatrix to_complex(const Eigen::MatrixXd& planar) {
  const Eigen::Index g = planar.cols() / 2;
  ComplexMatrix result(planar.rows(), g);
  result.real() = planar.leftCols(g);
  result.imag() = planar.rightCols(g);
  return result;
}

/// p(A, B | x), `[tokens][Nc * Nc]`.
inline Eigen::MatrixXd soft_assignment(const ComplexMatrix& x, const ComplexMatrix& z0,
                                       const ComplexMatrix& z1, double temperature) {
  const Eigen::Index Nc = z0.rows();
  Eigen::MatrixXd p(x.rows(), Nc * Nc);
  for (Eigen::Index t = 0; t < x.rows(); ++t) {
    for (Eigen::Index a = 0; a < Nc; ++a)
      for (Eigen::Index b = 0; b < Nc; ++b)
        p(t, a * Nc + b) = -(x.row(t) - z0.row(a) - z1.row(b)).squaredNorm() / temperature;
    p.row(t).array() = (p.row(t).array() - p.row(t).maxCoeff()).exp();
    p.row(t) /= p.row(t).sum();
  }
  return p;
}

/// The soft objective that the M step minimises.
inline double soft_objective(const ComplexMatrix& x, const Eigen::MatrixXd& p,
                             const ComplexMatrix& z0, const ComplexMatrix& z1) {
  const Eigen::Index Nc = z0.rows();
  double sum = 0;
  for (Eigen::Index t = 0; t < x.rows(); ++t)
    for (Eigen::Index a = 0; a < Nc; ++a)
      for (Eigen::Index b = 0; b < Nc; ++b)
        sum += p(t, a * Nc + b) * (x.row(t) - z0.row(a) - z1.row(b)).squaredNorm();
  return sum;
}

/// The tied M step: z minimises sum p |x - z_A - j z_B|^2, by the real least squares over all
/// (token, A, B), one column of unknowns per real and imaginary part.
inline ComplexMatrix solve_tied(const ComplexMatrix& x, const Eigen::MatrixXd& p, Eigen::Index Nc) {
  const std::complex<double> j(0, 1);
  ComplexMatrix normal = ComplexMatrix::Zero(Nc, Nc), right = ComplexMatrix::Zero(Nc, x.cols());
  for (Eigen::Index t = 0; t < x.rows(); ++t)
    for (Eigen::Index a = 0; a < Nc; ++a)
      for (Eigen::Index b = 0; b < Nc; ++b) {
        Eigen::VectorXcd design = Eigen::VectorXcd::Zero(Nc);
        design(a) += 1.0;
        design(b) += j;
        const double weight = p(t, a * Nc + b);
        normal += weight * design.conjugate() * design.transpose();
        right += weight * design.conjugate() * x.row(t);
      }
  return normal.completeOrthogonalDecomposition().solve(right);
}

}  // namespace commvq::reference
