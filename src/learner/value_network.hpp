#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "commvq/value_codec/value_codec.hpp"

#include "core/parallel_product.hpp"
#include "value_codec/value_layers.hpp"

namespace commvq {

/// The value codec as a network that can be trained: encoder, choice of patterns, linear decoder,
/// norm restoration (CommVQ, section 3.2), with its gradients written out.
///
/// Parameters and gradients are one flat vector each, in the order of `ValueCodecWeights`.
template <class Scalar>
class ValueNetwork {
 public:
  using Matrix = value_layers::Matrix<Scalar>;
  using Map = value_layers::MatrixMap<Scalar>;
  using ConstMap = value_layers::ConstMatrixMap<Scalar>;

  /// Hard: the pattern with the largest perturbed logit, gradients straight through to the soft
  /// choice. Soft: the expected bits, whose gradients are exact.
  enum class Choice { kHard, kSoft };

  /// One parameter: a row-major matrix at `offset` of the flat vector.
  struct Parameter {
    Index offset, rows, cols;
    Index size() const { return rows * cols; }
  };

  explicit ValueNetwork(const ValueCodecConfig& config) : config_(config) {
    config.validate();
    const Index C = config.num_channels, H = config.hidden_size, L = config.num_logits();
    norm_gain = next(1, C);
    norm_bias = next(1, C);
    hidden_weight = next(H, C);
    hidden_bias = next(1, H);
    output_weight = next(L, H);
    output_bias = next(1, L);
    decoder = next(config.num_code_bits(), C);
    parameters.assign(static_cast<std::size_t>(size_), Scalar(0));
    gradients = parameters;
  }

  /// Runs `units`, `[tokens][C]`, values of unit norm, through codec and back. `noise`,
  /// `[tokens][num_logits]`, is added to the logits before the choice. Returns the mean over tokens
  /// of |v - u / |u||^2 and keeps what `backward` needs.
  Scalar forward(const Matrix& units, const Matrix& noise, Scalar temperature, Choice choice);

  /// Writes the gradient of the last `forward`'s result to `gradients`.
  void backward();

  Parameter norm_gain, norm_bias, hidden_weight, hidden_bias, output_weight, output_bias, decoder;
  std::vector<Scalar> parameters;
  std::vector<Scalar> gradients;

  ConstMap value(const Parameter& p) const { return {&parameters[at(p)], p.rows, p.cols}; }
  Map value(const Parameter& p) { return {&parameters[at(p)], p.rows, p.cols}; }
  Map gradient(const Parameter& p) { return {&gradients[at(p)], p.rows, p.cols}; }

 private:
  static std::size_t at(const Parameter& p) { return static_cast<std::size_t>(p.offset); }
  Parameter next(Index rows, Index cols) {
    const Parameter parameter{size_, rows, cols};
    size_ += parameter.size();
    return parameter;
  }
  template <class Left, class Right, class Result>
  static void multiply(const Left& left, const Right& right, Result&& result) {
    detail::parallel_product(left, right, result);
  }
  /// In memory of its own: Eigen adds up in another order where the result is not aligned, which
  /// differs from run to run for gradients.
  template <class Rows>
  static Matrix sum_of_rows(const Rows& rows) {
    return rows.colwise().sum();
  }
  void choose(const Matrix& noise, Choice choice);
  Scalar restore(const Matrix& units);
  void backward_through_choice(const Matrix& bit_gradients);

  ValueCodecConfig config_;
  Index size_ = 0;
  Scalar temperature_ = 1;
  Matrix standardized_, scaled_, hidden_, slope_;
  Matrix logits_;   // then probabilities, then their gradients
  Matrix bits_;     // [tokens][num_code_bits]
  Matrix decoded_;  // [tokens][C]: u, then the gradient with respect to u
};

template <class Scalar>
Scalar ValueNetwork<Scalar>::forward(const Matrix& units, const Matrix& noise, Scalar temperature,
                                     Choice choice) {
  temperature_ = temperature;
  standardized_.resize(units.rows(), units.cols());
  scaled_.resize(units.rows(), units.cols());
#pragma omp parallel for
  for (Index t = 0; t < units.rows(); ++t) {
    value_layers::standardize(units.row(t).data(), units.cols(), standardized_.row(t).data());
    scaled_.row(t) =
        standardized_.row(t).cwiseProduct(value(norm_gain).row(0)) + value(norm_bias).row(0);
  }
  hidden_.resize(units.rows(), config_.hidden_size);
  multiply(scaled_, value(hidden_weight).transpose(), hidden_);
  slope_.resize(hidden_.rows(), hidden_.cols());
#pragma omp parallel for
  for (Index t = 0; t < units.rows(); ++t) {
    hidden_.row(t) += value(hidden_bias).row(0);
    value_layers::gelu<Scalar>(hidden_.row(t).data(), hidden_.cols(), slope_.row(t).data());
  }
  logits_.resize(units.rows(), config_.num_logits());
  multiply(hidden_, value(output_weight).transpose(), logits_);
  choose(noise, choice);
  decoded_.resize(units.rows(), units.cols());
  multiply(bits_, value(decoder), decoded_);
  return restore(units);
}

/// Perturbed logits to probabilities and bits.
template <class Scalar>
void ValueNetwork<Scalar>::choose(const Matrix& noise, Choice choice) {
  bits_.resize(logits_.rows(), config_.num_code_bits());
#pragma omp parallel for
  for (Index t = 0; t < logits_.rows(); ++t) {
    auto logits = logits_.row(t);
    logits += value(output_bias).row(0) + noise.row(t);
    Scalar* const p = logits.data();
    Scalar* const bits = bits_.row(t).data();
    const Index groups = config_.num_groups();
    if (choice == Choice::kHard) value_layers::choose_patterns<Scalar>(p, groups, bits);
    for (Index g = 0; g < groups; ++g) {
      Scalar* const z = p + 4 * g;
      const Scalar largest = std::max(std::max(z[0], z[1]), std::max(z[2], z[3]));
      for (int k = 0; k < 4; ++k) z[k] = (z[k] - largest) / temperature_;
    }
    logits = logits.array().exp();
#pragma omp simd
    for (Index g = 0; g < groups; ++g) {
      Scalar* const z = p + 4 * g;
      const Scalar factor = 1 / (z[0] + z[1] + z[2] + z[3]);
      for (int k = 0; k < 4; ++k) z[k] *= factor;
      if (choice == Choice::kSoft) {
        bits[2 * g] = z[0] + z[2];
        bits[2 * g + 1] = z[1] + z[2];
      }
    }
  }
}

/// The loss; replaces u by its gradient -2 (v - (v . u^) u^) / (|u| tokens), u^ = u / |u|.
template <class Scalar>
Scalar ValueNetwork<Scalar>::restore(const Matrix& units) {
  const auto tokens = static_cast<Scalar>(units.rows());
  Eigen::Matrix<Scalar, Eigen::Dynamic, 1> losses(units.rows());
#pragma omp parallel for
  for (Index t = 0; t < units.rows(); ++t) {
    auto u = decoded_.row(t);
    const Scalar length = std::max(u.norm(), Scalar(1e-20));
    u /= length;
    const Scalar cosine = u.dot(units.row(t));
    losses[t] = (units.row(t) - u).squaredNorm();
    u = (cosine * u - units.row(t)) * (2 / (length * tokens));
  }
  return losses.sum() / tokens;
}

template <class Scalar>
void ValueNetwork<Scalar>::backward() {
  multiply(bits_.transpose(), decoded_, gradient(decoder));
  Matrix bit_gradients(bits_.rows(), bits_.cols());
  multiply(decoded_, value(decoder).transpose(), bit_gradients);
  backward_through_choice(bit_gradients);
  multiply(logits_.transpose(), hidden_, gradient(output_weight));
  gradient(output_bias) = sum_of_rows(logits_);
  Matrix hidden_gradients(hidden_.rows(), hidden_.cols());
  multiply(logits_, value(output_weight), hidden_gradients);
  hidden_gradients.array() *= slope_.array();
  multiply(hidden_gradients.transpose(), scaled_, gradient(hidden_weight));
  gradient(hidden_bias) = sum_of_rows(hidden_gradients);
  Matrix scaled_gradients(scaled_.rows(), scaled_.cols());
  multiply(hidden_gradients, value(hidden_weight), scaled_gradients);
  gradient(norm_gain) = sum_of_rows(scaled_gradients.cwiseProduct(standardized_));
  gradient(norm_bias) = sum_of_rows(scaled_gradients);
}

/// Probabilities to gradients of the logits: the Jacobian of the soft choice.
template <class Scalar>
void ValueNetwork<Scalar>::backward_through_choice(const Matrix& bit_gradients) {
#pragma omp parallel for
  for (Index t = 0; t < logits_.rows(); ++t) {
    Scalar* const p = logits_.row(t).data();
    const Scalar* const d = bit_gradients.row(t).data();
#pragma omp simd
    for (Index g = 0; g < config_.num_groups(); ++g) {
      Scalar* const z = p + 4 * g;
      const Scalar d0 = d[2 * g], d1 = d[2 * g + 1];
      const Scalar mean = (z[0] + z[2]) * d0 + (z[1] + z[2]) * d1;
      z[0] *= (d0 - mean) / temperature_;
      z[1] *= (d1 - mean) / temperature_;
      z[2] *= (d0 + d1 - mean) / temperature_;
      z[3] *= -mean / temperature_;
    }
  }
}

}  // namespace commvq
