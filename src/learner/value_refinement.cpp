#include "learner/value_refinement.hpp"

#include <algorithm>

#include "commvq/core/graded_bits.hpp"

#include <Eigen/Cholesky>

#include "core/parallel_product.hpp"
#include "learner/graded_decoder.hpp"
#include "value_codec/value_layers.hpp"

namespace commvq {
namespace {

using Decoder = value_layers::Matrix<float>;

/// E + (N + lambda I)^-1 (right - N E): least squares with the proximal term lambda |E - old|^2,
/// lambda = ridge * mean diagonal.
Decoder solve(const Eigen::MatrixXd& normal, const Eigen::MatrixXd& right, const Decoder& decoder,
              double ridge) {
  const Eigen::MatrixXd old = decoder.cast<double>();
  Eigen::MatrixXd target(old.rows(), old.cols());
  detail::parallel_product(normal, old, target);
  target = right - target;
  Eigen::MatrixXd system = normal;
  const double mean = system.diagonal().mean();
  if (!(mean > 0)) return decoder;
  system.diagonal().array() += ridge * mean;
  return (old + system.llt().solve(target)).cast<float>();
}

/// `[bits][numbers]`: the matrix T of decoder = T * rows of the numbers, the bits' weights.
Eigen::MatrixXd tie_of(Index num_bits) {
  Eigen::MatrixXd tie = Eigen::MatrixXd::Zero(num_bits, num_bits / 2);
  for (int i = 0; i < num_bits; ++i) tie(i, graded_bit(i).number) = graded_bit(i).weight;
  return tie;
}

/// The decoder after a round, over numbers in the place of bits where codes are graded.
std::vector<float> refined(const CodedValues& coded, const std::vector<float>& decoder,
                           const ValueRefinement& refinement, bool graded) {
  const value_layers::ConstMatrixMap<float> old(decoder.data(), coded.right.rows(),
                                                coded.right.cols());
  Decoder result;
  if (graded) {
    const Eigen::MatrixXd tie = tie_of(old.rows());
    Decoder numbers(tie.cols(), old.cols());
    for (int i = 0; i < old.rows(); ++i)
      if (const GradedBit bit = graded_bit(i); bit.weight == 1)
        numbers.row(bit.number) = old.row(i);
    numbers = solve(tie.transpose() * coded.normal * tie, tie.transpose() * coded.right, numbers,
                    refinement.ridge);
    result = graded_decoder::of_numbers(numbers);
  } else {
    result = solve(coded.normal, coded.right, old, refinement.ridge);
  }
  return {result.data(), result.data() + result.size()};
}

}  // namespace

std::vector<double> refine_value_decoder(ValueWork& values, const std::vector<Index>& rows,
                                         const ValueRefinement& refinement, bool graded,
                                         ValueCodecWeights& weights,
                                         const std::function<void(int, double)>& done) {
  CodedValues coded = values.encode(weights, rows);
  std::vector<double> errors = {coded.relative_error};
  ValueCodecWeights candidate = weights;
  for (int round = 0; round < refinement.rounds; ++round) {
    candidate.decoder = refined(coded, candidate.decoder, refinement, graded);
    coded = values.encode(candidate, rows);
    if (coded.relative_error < *std::min_element(errors.begin(), errors.end())) weights = candidate;
    errors.push_back(coded.relative_error);
    done(round, coded.relative_error);
  }
  return errors;
}

}  // namespace commvq
