#include "learner/value_refinement.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "commvq/core/float16.hpp"

#include <Eigen/Cholesky>

#include "core/parallel_product.hpp"
#include "value_codec/value_layers.hpp"

namespace commvq {
namespace {

using value_layers::Matrix;

/// Tokens whose codes are unpacked at a time.
constexpr Index kBlockTokens = 1024;

/// Codes and scales of values, and the sums over values that least squares needs.
struct Coded {
  double relative_error = 0;  ///< mean of |v - decoded|^2 / |v|^2
  Eigen::MatrixXd normal;     ///< [num_code_bits][num_code_bits]: sum of s^2 b b^T
  Eigen::MatrixXd right;      ///< [num_code_bits][C]: sum of s b (v / |v|)^T
};

Coded encode_all(MatrixView<const float> values, const ValueCodec& codec) {
  const Index num_bits = codec.config().num_code_bits(), C = values.cols;
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(values.rows * codec.code_bytes()));
  std::vector<std::uint16_t> scales(static_cast<std::size_t>(values.rows));
  const auto code_rows = as_matrix(codes, values.rows, codec.code_bytes());
  codec.encode(values, code_rows, scales.data());

  const value_layers::ConstMatrixMap<float> E(codec.decoder().data, num_bits, C);
  Coded result{0, Eigen::MatrixXd::Zero(num_bits, num_bits), Eigen::MatrixXd::Zero(num_bits, C)};
  for (Index first = 0; first < values.rows; first += kBlockTokens) {
    const Index count = std::min(kBlockTokens, values.rows - first);
    Matrix<float> bits(count, num_bits), units(count, C);  // bits times the scale of unit values
    for (Index t = 0; t < count; ++t) {
      const double norm = value_layers::norm_of(values.row(first + t), C);
      const auto scale =
          static_cast<float>(from_bf16(scales[static_cast<std::size_t>(first + t)]) / norm);
      for (Index i = 0; i < num_bits; ++i)
        bits(t, i) = (code_rows(first + t, i / 8) >> (i % 8) & 1) != 0 ? scale : 0.0f;
      for (Index c = 0; c < C; ++c) units(t, c) = static_cast<float>(values(first + t, c) / norm);
    }
    Matrix<float> normal(num_bits, num_bits), right(num_bits, C), decoded(count, C);
    detail::parallel_product(bits.transpose(), bits, normal);
    detail::parallel_product(bits.transpose(), units, right);
    detail::parallel_product(bits, E, decoded);
    result.normal += normal.cast<double>();
    result.right += right.cast<double>();
    result.relative_error += (units - decoded).squaredNorm();
  }
  result.relative_error /= static_cast<double>(values.rows);
  return result;
}

/// E + (N + lambda I)^-1 (right - N E): least squares with the proximal term lambda |E - old|^2,
/// lambda = ridge * mean diagonal.
std::vector<float> solve(const Coded& coded, const std::vector<float>& decoder, double ridge) {
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
  const Matrix<float> solution = (old + system.llt().solve(target)).cast<float>();
  return {solution.data(), solution.data() + solution.size()};
}

}  // namespace

std::vector<double> refine_value_decoder(MatrixView<const float> values,
                                         const ValueRefinement& refinement,
                                         const ValueCodecConfig& config, ValueCodecWeights& weights,
                                         const std::function<void(int, double)>& done) {
  Coded coded = encode_all(values, ValueCodec(config, weights));
  std::vector<double> errors = {coded.relative_error};
  ValueCodecWeights candidate = weights;
  for (int round = 0; round < refinement.rounds; ++round) {
    candidate.decoder = solve(coded, candidate.decoder, refinement.ridge);
    coded = encode_all(values, ValueCodec(config, candidate));
    if (coded.relative_error < *std::min_element(errors.begin(), errors.end())) weights = candidate;
    errors.push_back(coded.relative_error);
    done(round, coded.relative_error);
  }
  return errors;
}

}  // namespace commvq
