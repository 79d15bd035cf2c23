#include "learner/graded_directions.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "commvq/core/graded_bits.hpp"

#include <Eigen/Eigenvalues>

namespace commvq {
namespace {

/// The uniform quantiser of least error of a normal distribution of variance 1, by bits.
struct Quantiser {
  double step, error;
};
constexpr Quantiser kQuantisers[] = {{0, 1}, {1.596, 0.3634}, {0.9957, 0.1188}, {0.586, 0.03744}};

/// Numbers of a code, those of most bits first.
std::vector<int> numbers_by_bits(int num_numbers) {
  std::vector<int> numbers(static_cast<std::size_t>(num_numbers));
  std::iota(numbers.begin(), numbers.end(), 0);
  std::stable_sort(numbers.begin(), numbers.end(),
                   [](int a, int b) { return graded_bits(a) > graded_bits(b); });
  return numbers;
}

}  // namespace

Eigen::MatrixXd graded_directions(const Eigen::MatrixXd& covariance, int num_numbers) {
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> axes(covariance);
  Eigen::VectorXd left = axes.eigenvalues().cwiseMax(0);
  Eigen::MatrixXd directions(num_numbers, covariance.cols());
  for (const int number : numbers_by_bits(num_numbers)) {
    const Quantiser& quantiser = kQuantisers[graded_bits(number)];
    Eigen::Index axis = 0;
    left.maxCoeff(&axis);
    directions.row(number) =
        quantiser.step * std::sqrt(left(axis)) * axes.eigenvectors().col(axis).transpose();
    left(axis) *= quantiser.error;
  }
  return directions;
}

}  // namespace commvq
