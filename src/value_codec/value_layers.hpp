#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "commvq/core/view.hpp"
#include "commvq/value_codec/value_codec.hpp"

/// Element-wise layers of the value encoder, shared by the codec and its trainer.
namespace commvq::value_layers {

template <class Scalar>
using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class Scalar>
using ConstMatrixMap = Eigen::Map<const Matrix<Scalar>>;
template <class Scalar>
using MatrixMap = Eigen::Map<Matrix<Scalar>>;

/// L2 norm, accumulated in double so that no float value overflows.
inline double norm_of(const float* values, Index count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (Index i = 0; i < count; ++i) sum += static_cast<double>(values[i]) * values[i];
  return std::sqrt(sum);
}

/// LayerNorm without gain and bias: (x - mean) / sqrt(variance + epsilon).
template <class Scalar>
void standardize(const Scalar* x, Index count, Scalar* out) {
  Scalar sum = 0;
#pragma omp simd reduction(+ : sum)
  for (Index i = 0; i < count; ++i) sum += x[i];
  const Scalar mean = sum / static_cast<Scalar>(count);
  Scalar squares = 0;
#pragma omp simd reduction(+ : squares)
  for (Index i = 0; i < count; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const Scalar variance = squares / static_cast<Scalar>(count);
  const Scalar factor = 1 / std::sqrt(variance + Scalar(kValueLayerNormEpsilon));
#pragma omp simd
  for (Index i = 0; i < count; ++i) out[i] = (x[i] - mean) * factor;
}

/// GELU in place, x -> x Phi(x); `slope`, if not null, receives the derivative Phi(x) + x phi(x).
/// In double Phi comes from std::erfc, in float from Abramowitz and Stegun 7.1.26, whose error of
/// 1.5e-7 is that of float arithmetic and whose exponential is the one that phi(x) needs.
template <class Scalar>
void gelu(Scalar* x, Index count, Scalar* slope) {
  constexpr Index kChunk = 128;
  Scalar bell[kChunk];
  for (Index first = 0; first < count; first += kChunk) {
    const Index size = std::min(kChunk, count - first);
    Scalar* const in = x + first;
    Eigen::Map<Eigen::Array<Scalar, Eigen::Dynamic, 1>> value(in, size);
    Eigen::Map<Eigen::Array<Scalar, Eigen::Dynamic, 1>>(bell, size) =
        (value.square() * Scalar(-0.5)).exp();
#pragma omp simd
    for (Index i = 0; i < size; ++i) {
      Scalar phi_tail;  // Phi(-|x|)
      if constexpr (std::is_same_v<Scalar, float>) {
        const float t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * std::abs(in[i]));
        const float series =
            0.254829592f +
            t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f)));
        phi_tail = 0.5f * t * series * bell[i];
      } else {
        phi_tail = std::erfc(std::abs(in[i]) * std::sqrt(Scalar(0.5))) / 2;
      }
      const Scalar phi = in[i] > 0 ? 1 - phi_tail : phi_tail;
      constexpr auto kInverseRootTwoPi = static_cast<Scalar>(0.398942280401432678);
      if (slope != nullptr) slope[first + i] = phi + in[i] * kInverseRootTwoPi * bell[i];
      in[i] *= phi;
    }
  }
}

/// The bits of the largest of four logits in each group; the first wins a tie.
/// `logits` is `[4 * groups]`, `bits` `[2 * groups]`.
template <class Scalar>
void choose_patterns(const Scalar* logits, Index groups, Scalar* bits) {
#pragma omp simd
  for (Index g = 0; g < groups; ++g) {
    const Scalar* const z = logits + 4 * g;
    const Scalar largest = std::max(std::max(z[0], z[1]), std::max(z[2], z[3]));
    const bool first = z[0] == largest;
    const bool second = !first && z[1] == largest;
    const bool both = !first && !second && z[2] == largest;
    bits[2 * g] = first || both ? Scalar(1) : Scalar(0);
    bits[2 * g + 1] = second || both ? Scalar(1) : Scalar(0);
  }
}

}  // namespace commvq::value_layers
