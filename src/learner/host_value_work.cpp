#include "learner/host_value_work.hpp"

#include <algorithm>
#include <cmath>

#include "commvq/core/float16.hpp"

#include "core/parallel_product.hpp"
#include "learner/graded_decoder.hpp"
#include "learner/gumbel.hpp"

namespace commvq {
namespace {

/// Values whose codes are unpacked at a time.
constexpr Index kBlockTokens = 1024;

using Parameter = ValueNetwork<float>::Parameter;

/// The network's parameters with their places among the weights.
template <class Use>
void for_each_parameter(const ValueNetwork<float>& network, Use use) {
  use(network.norm_gain, &ValueCodecWeights::norm_gain);
  use(network.norm_bias, &ValueCodecWeights::norm_bias);
  use(network.hidden_weight, &ValueCodecWeights::hidden_weight);
  use(network.hidden_bias, &ValueCodecWeights::hidden_bias);
  use(network.output_weight, &ValueCodecWeights::output_weight);
  use(network.output_bias, &ValueCodecWeights::output_bias);
  use(network.decoder, &ValueCodecWeights::decoder);
}

}  // namespace

HostValueWork::HostValueWork(MatrixView<const float> values, const ValueCodecConfig& config,
                             const ValueCodecWeights& initial)
    : values_(values),
      config_(config),
      network_(config),
      first_moments_(network_.parameters.size(), 0.0f),
      second_moments_(network_.parameters.size(), 0.0f) {
  for_each_parameter(network_, [&](const Parameter& parameter, auto weight) {
    std::copy((initial.*weight).begin(), (initial.*weight).end(),
              network_.parameters.begin() + parameter.offset);
  });
}

double HostValueWork::train(const std::vector<Index>& rows, std::uint32_t noise_key,
                            double temperature, double learning_rate) {
  units_.resize(static_cast<Index>(rows.size()), values_.cols);
  noise_.resize(units_.rows(), config_.num_logits());
#pragma omp parallel for
  for (Index i = 0; i < units_.rows(); ++i) {
    const float* const value = values_.row(rows[static_cast<std::size_t>(i)]);
    const double norm = value_layers::norm_of(value, values_.cols);
    for (Index c = 0; c < values_.cols; ++c) units_(i, c) = static_cast<float>(value[c] / norm);
    auto noise = noise_.row(i);
    const auto first = static_cast<std::uint32_t>(i * noise_.cols());
    float* const uniform = noise.data();
#pragma omp simd
    for (Index j = 0; j < noise_.cols(); ++j)
      uniform[j] = gumbel::uniform_at(noise_key, first + static_cast<std::uint32_t>(j));
    noise = -(-noise.array().log()).log();
  }
  const double loss = network_.forward(units_, noise_, static_cast<float>(temperature),
                                       ValueNetwork<float>::Choice::kHard);
  network_.backward();
  step(learning_rate);
  if (config_.graded)
    graded_decoder::tie(network_.value(network_.decoder).data(), config_.num_code_bits(),
                        config_.num_channels);
  return loss;
}

/// Adam without weight decay (Kingma and Ba 2015, algorithm 1).
void HostValueWork::step(double rate) {
  constexpr double kBeta1 = 0.9, kBeta2 = 0.999;
  constexpr auto b1 = static_cast<float>(kBeta1), b2 = static_cast<float>(kBeta2);
  ++steps_;
  const double correction =
      std::sqrt(1 - std::pow(kBeta2, steps_)) / (1 - std::pow(kBeta1, steps_));
  const auto scaled_rate = static_cast<float>(rate * correction);
  const auto size = static_cast<Index>(network_.parameters.size());
#pragma omp parallel for simd
  for (Index j = 0; j < size; ++j) {
    const auto i = static_cast<std::size_t>(j);
    const float gradient = network_.gradients[i];
    first_moments_[i] = b1 * first_moments_[i] + (1 - b1) * gradient;
    second_moments_[i] = b2 * second_moments_[i] + (1 - b2) * gradient * gradient;
    network_.parameters[i] -=
        scaled_rate * first_moments_[i] / (std::sqrt(second_moments_[i]) + 1e-8f);
  }
}

ValueCodecWeights HostValueWork::weights() {
  ValueCodecWeights result;
  for_each_parameter(network_, [&](const Parameter& parameter, auto weight) {
    const auto first = network_.parameters.begin() + parameter.offset;
    (result.*weight).assign(first, first + parameter.size());
  });
  return result;
}

CodedValues HostValueWork::encode(const ValueCodecWeights& weights,
                                  const std::vector<Index>& rows) {
  const ValueCodec codec(config_, weights);
  const auto num_rows = static_cast<Index>(rows.size());
  const Index num_bits = config_.num_code_bits(), C = values_.cols;
  std::vector<float> values(static_cast<std::size_t>(num_rows * C));
  for (Index t = 0; t < num_rows; ++t)
    std::copy_n(values_.row(rows[static_cast<std::size_t>(t)]), C, values.begin() + t * C);
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(num_rows * codec.code_bytes()));
  std::vector<std::uint16_t> scales(static_cast<std::size_t>(num_rows));
  const auto code_rows = as_matrix(codes, num_rows, codec.code_bytes());
  codec.encode(as_matrix(values, num_rows, C), code_rows, scales.data());

  const value_layers::ConstMatrixMap<float> E(codec.decoder().data, num_bits, C);
  CodedValues result{0, Eigen::MatrixXd::Zero(num_bits, num_bits),
                     Eigen::MatrixXd::Zero(num_bits, C)};
  for (Index first = 0; first < num_rows; first += kBlockTokens) {
    const Index count = std::min(kBlockTokens, num_rows - first);
    Matrix bits(count, num_bits), units(count, C);  // bits times the scale of unit values
    for (Index t = 0; t < count; ++t) {
      const float* const value = values.data() + (first + t) * C;
      const double norm = value_layers::norm_of(value, C);
      const auto scale =
          static_cast<float>(from_bf16(scales[static_cast<std::size_t>(first + t)]) / norm);
      for (Index i = 0; i < num_bits; ++i)
        bits(t, i) = (code_rows(first + t, i / 8) >> (i % 8) & 1) != 0 ? scale : 0.0f;
      for (Index c = 0; c < C; ++c) units(t, c) = static_cast<float>(value[c] / norm);
    }
    Matrix normal(num_bits, num_bits), right(num_bits, C), decoded(count, C);
    detail::parallel_product(bits.transpose(), bits, normal);
    detail::parallel_product(bits.transpose(), units, right);
    detail::parallel_product(bits, E, decoded);
    result.normal += normal.cast<double>();
    result.right += right.cast<double>();
    result.relative_error += (units - decoded).squaredNorm();
  }
  result.relative_error /= static_cast<double>(num_rows);
  return result;
}

}  // namespace commvq
