#include "value_codec/value_polish.hpp"

#include <algorithm>
#include <cmath>

#include "commvq/core/graded_bits.hpp"

#include "core/parallel_product.hpp"

namespace commvq::value_polish {
namespace {

/// One pass over the bits of a token: bit i is flipped, b_i += d, where that lowers |v / s - u|^2,
/// that is where -2 d <E_i, v / s - u> + |E_i|^2 < 0. `value_products` holds <E_i, v>, `products`
/// <E_i, u>, kept up to date. Returns whether any bit was flipped.
bool flip_bits(const ConstMatrixMap<float>& gram, const float* value_products, float inverse_scale,
               float* products, float* bits) {
  const Index count = gram.rows();
  bool flipped = false;
  for (Index i = 0; i < count; ++i) {
    const float change = bits[i] > 0 ? -1.0f : 1.0f;
    const float left = value_products[i] * inverse_scale - products[i];
    if (!(gram(i, i) - 2 * change * left < 0)) continue;
    bits[i] += change;
    const float* const row = gram.row(i).data();
#pragma omp simd
    for (Index j = 0; j < count; ++j) products[j] += change * row[j];
    flipped = true;
  }
  return flipped;
}

/// One pass over the numbers of a graded token: each takes the value that is best for |v / s -
/// u|^2, at once however many bits change. Bit i is the last of a number's, whose row is its
/// vector.
bool move_numbers(const ConstMatrixMap<float>& gram, const float* value_products,
                  float inverse_scale, float* products, float* bits) {
  const Index count = gram.rows();
  bool moved = false;
  for (int i = 0; i < count; ++i) {
    const GradedBit last = graded_bit(i);
    if (last.weight > 1) continue;
    const int num_bits = graded_bits(last.number);
    float number = 0;
    for (int k = 0; k < num_bits; ++k) number += bits[i - k] * static_cast<float>(1 << k);
    const float left = value_products[i] * inverse_scale - products[i];
    const float best = std::nearbyint(number + left / gram(i, i));
    if (!std::isfinite(best)) continue;
    const float moved_to = std::clamp(best, 0.0f, static_cast<float>((1 << num_bits) - 1));
    const float change = moved_to - number;
    if (change == 0) continue;
    for (int k = 0; k < num_bits; ++k)
      bits[i - k] = static_cast<float>(static_cast<int>(moved_to) >> k & 1);
    const float* const row = gram.row(i).data();
#pragma omp simd
    for (Index j = 0; j < count; ++j) products[j] += change * row[j];
    moved = true;
  }
  return moved;
}

double dot(const float* x, const float* y, Index count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (Index i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * y[i];
  return sum;
}

/// s = <v, u> / |u|^2, which minimises |v - s u|^2; |v| / |u| where that is not positive, and 1
/// where u is zero.
double scale_of(double product, double value_length, double length) {
  if (!(length > 0)) return 1.0;
  return product > 0 ? product / (length * length) : value_length / length;
}

}  // namespace

Matrix<float> gram_of(const ConstMatrixMap<float>& decoder) {
  Matrix<float> gram(decoder.rows(), decoder.rows());
  detail::parallel_product(decoder, decoder.transpose(), gram);
  return gram;
}

void polish(const ConstMatrixMap<float>& decoder, const ConstMatrixMap<float>& gram,
            const Matrix<float>& values, int sweeps, bool graded, Matrix<float>& bits) {
  const auto pass = graded ? move_numbers : flip_bits;
  const Index num_bits = bits.cols();
  Matrix<float> value_products(values.rows(), num_bits), products(values.rows(), num_bits);
  detail::parallel_product(values, decoder.transpose(), value_products);
  detail::parallel_product(bits, gram, products);
  for (Index t = 0; t < values.rows(); ++t) {
    const float* const of_value = value_products.row(t).data();
    float* const of_sum = products.row(t).data();
    float* const b = bits.row(t).data();
    const double value_length = value_layers::norm_of(values.row(t).data(), values.cols());
    for (int sweep = 0; sweep < sweeps; ++sweep) {
      // <v, u> and |u|^2 are sums over the bits.
      const double length = std::sqrt(std::max(0.0, dot(of_sum, b, num_bits)));
      const double scale = scale_of(dot(of_value, b, num_bits), value_length, length);
      const auto inverse = static_cast<float>(scale > 0 ? 1 / scale : 0);
      if (!pass(gram, of_value, inverse, of_sum, b)) break;
    }
  }
}

}  // namespace commvq::value_polish
