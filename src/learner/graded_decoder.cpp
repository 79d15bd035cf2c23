#include "learner/graded_decoder.hpp"

#include "learner/graded_directions.hpp"
#include "learner/moments.hpp"

namespace commvq::graded_decoder {
namespace {

/// Of decoded values, in training.
constexpr double kLength = 30.0;

/// Of the values of unit norm.
Moments moments_of(MatrixView<const float> values, const std::vector<Index>& rows) {
  const auto size = static_cast<Index>(rows.size());
  return commvq::moments_of(size, values.cols, [&](Index first, Index count) {
    Eigen::MatrixXd batch(count, values.cols);
    for (Index t = 0; t < count; ++t) {
      const float* const value = values.row(rows[static_cast<std::size_t>(first + t)]);
      const double norm = value_layers::norm_of(value, values.cols);
      for (Index c = 0; c < values.cols; ++c) batch(t, c) = value[c] / norm;
    }
    return batch;
  });
}

}  // namespace

Rows of_numbers(const Rows& numbers) {
  Rows decoder(2 * numbers.rows(), numbers.cols());
  for (int i = 0; i < decoder.rows(); ++i)
    decoder.row(i) = static_cast<float>(graded_bit(i).weight) * numbers.row(graded_bit(i).number);
  return decoder;
}

std::vector<float> initial(MatrixView<const float> values, const std::vector<Index>& rows,
                           const ValueCodecConfig& config) {
  const Moments moments = moments_of(values, rows);
  const int num_numbers = config.num_code_bits() / 2;
  Eigen::MatrixXd numbers = graded_directions(moments.covariance, num_numbers);
  // Numbers are not negative: what they add up to when each is half its largest must be the mean.
  Eigen::RowVectorXd halves(num_numbers);
  for (int n = 0; n < num_numbers; ++n) halves(n) = 0.5 * ((1 << graded_bits(n)) - 1);
  numbers += halves.transpose() * (moments.mean - halves * numbers) / halves.squaredNorm();
  const Rows decoder = of_numbers((kLength * numbers).cast<float>());
  return {decoder.data(), decoder.data() + decoder.size()};
}

}  // namespace commvq::graded_decoder
