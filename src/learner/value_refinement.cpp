#include "learner/value_refinement.hpp"

#include <algorithm>

#include "core/parallel_product.hpp"
#include "value_codec/value_layers.hpp"

#include <Eigen/Cholesky>

namespace commvq {
namespace {

/// E + (N + lambda I)^-1 (right - N E): least squares with the proximal term lambda |E - old|^2,
/// lambda = ridge * mean diagonal.
std::vector<float> solve(const CodedValues& coded, const std::vector<float>& decoder,
                         double ridge) {
  const Eigen::MatrixXd old =
      value_layers::ConstMatrixMap<float>(decoder.data(), coded.right.rows(), coded.right.cols())
          .cast<double>();
  Eigen::MatrixXd target(old.rows(), old.cols());
  detail::parallel_product(coded.normal, old, target);
  target = coded.right - target;
  Eigen::MatrixXd system = coded.normal;
  const double mean = system.diagonal().mean();
  if (!(mean > 0)) return decoder;
  system.diagonal().array() += ridge * mean;
  const value_layers::Matrix<float> solution =
      (old + system.llt().solve(target)).cast<float>();
  return {solution.data(), solution.data() + solution.size()};
}

}  // namespace

std::vector<double> refine_value_decoder(ValueWork& values, const std::vector<Index>& rows,
                                         const ValueRefinement& refinement,
                                         ValueCodecWeights& weights,
                                         const std::function<void(int, double)>& done) {
  CodedValues coded = values.encode(weights, rows);
  std::vector<double> errors = {coded.relative_error};
  ValueCodecWeights candidate = weights;
  for (int round = 0; round < refinement.rounds; ++round) {
    candidate.decoder = solve(coded, candidate.decoder, refinement.ridge);
    coded = values.encode(candidate, rows);
    if (coded.relative_error < *std::min_element(errors.begin(), errors.end())) weights = candidate;
    errors.push_back(coded.relative_error);
    done(round, coded.relative_error);
  }
  return errors;
}

}  // namespace commvq
