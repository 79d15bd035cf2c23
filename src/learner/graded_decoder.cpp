#include "learner/graded_decoder.hpp"

#include <algorithm>

#include <Eigen/Core>

#include "learner/graded_directions.hpp"
#include "value_codec/value_layers.hpp"

namespace commvq::graded_decoder {
namespace {

/// Values that are read at once.
constexpr Index kBatch = 4096;

/// Of decoded values, in training.
constexpr double kLength = 30.0;

struct Moments {
  Eigen::RowVectorXd mean;     ///< [C]
  Eigen::MatrixXd covariance;  ///< [C][C]
};

/// Of the values of unit norm.
Moments moments_of(MatrixView<const float> values, const std::vector<Index>& rows) {
  Moments result{Eigen::RowVectorXd::Zero(values.cols),
                 Eigen::MatrixXd::Zero(values.cols, values.cols)};
  const auto size = static_cast<Index>(rows.size());
  for (Index first = 0; first < size; first += kBatch) {
    Eigen::MatrixXd batch(std::min(kBatch, size - first), values.cols);
    for (Index t = 0; t < batch.rows(); ++t) {
      const float* const value = values.row(rows[static_cast<std::size_t>(first + t)]);
      const double norm = value_layers::norm_of(value, values.cols);
      for (Index c = 0; c < values.cols; ++c) batch(t, c) = value[c] / norm;
    }
    result.mean += batch.colwise().sum() / double(size);
    result.covariance.noalias() += batch.transpose() * batch / double(size);
  }
  result.covariance.noalias() -= result.mean.transpose() * result.mean;
  return result;
}

}  // namespace

std::vector<float> initial(MatrixView<const float> values, const std::vector<Index>& rows,
                           const ValueCodecConfig& config) {
  const Moments moments = moments_of(values, rows);
  const int num_bits = config.num_code_bits(), num_numbers = num_bits / 2;
  Eigen::MatrixXd numbers = graded_directions(moments.covariance, num_numbers);
  // Numbers are not negative: what they add up to when each is half its largest must be the mean.
  Eigen::RowVectorXd halves(num_numbers);
  for (int n = 0; n < num_numbers; ++n) halves(n) = 0.5 * ((1 << graded_bits(n)) - 1);
  numbers += halves.transpose() * (moments.mean - halves * numbers) / halves.squaredNorm();
  value_layers::Matrix<float> decoder(num_bits, values.cols);
  for (int i = 0; i < num_bits; ++i)
    decoder.row(i) = static_cast<float>(graded_bit(i).weight) *
                     (kLength * numbers.row(graded_bit(i).number)).cast<float>();
  return {decoder.data(), decoder.data() + decoder.size()};
}

}  // namespace commvq::graded_decoder
