#include "learner/moments.hpp"

#include <algorithm>

namespace commvq {

Moments moments_of(Index size, Index width,
                   const std::function<Eigen::MatrixXd(Index first, Index count)>& read) {
  constexpr Index kBatch = 4096;
  Moments result{Eigen::RowVectorXd::Zero(width), Eigen::MatrixXd::Zero(width, width)};
  for (Index first = 0; first < size; first += kBatch) {
    const Eigen::MatrixXd batch = read(first, std::min(kBatch, size - first));
    result.mean += batch.colwise().sum() / static_cast<double>(size);
    result.covariance.noalias() += batch.transpose() * batch / static_cast<double>(size);
  }
  result.covariance.noalias() -= result.mean.transpose() * result.mean;
  return result;
}

}  // namespace commvq
