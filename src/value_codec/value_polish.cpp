#include "value_codec/value_polish.hpp"

namespace commvq::value_polish {
namespace {

/// One pass over the bits of a token: bit i is flipped, b_i += d, where that lowers the error
/// |t - E^T b|^2, that is where -2 d <E_i, t - E^T b> + |E_i|^2 < 0. `products` holds
/// <E_i, t - E^T b> and is kept up to date. Returns whether any bit was flipped.
bool flip_bits(const ConstMatrixMap<float>& gram, float* products, float* bits) {
  const Index count = gram.rows();
  bool flipped = false;
  for (Index i = 0; i < count; ++i) {
    const float change = bits[i] > 0 ? -1.0f : 1.0f;
    if (!(gram(i, i) - 2 * change * products[i] < 0)) continue;
    bits[i] += change;
    const float* const row = gram.row(i).data();
#pragma omp simd
    for (Index j = 0; j < count; ++j) products[j] -= change * row[j];
    flipped = true;
  }
  return flipped;
}

}  // namespace

double best_scale(const float* value, const float* decoded, Index count) {
  double product = 0;
#pragma omp simd reduction(+ : product)
  for (Index i = 0; i < count; ++i) product += static_cast<double>(value[i]) * decoded[i];
  const double length = value_layers::norm_of(decoded, count);
  if (length == 0) return 1.0;
  return product > 0 ? product / (length * length) : value_layers::norm_of(value, count) / length;
}

Matrix<float> gram_of(const ConstMatrixMap<float>& decoder) {
  return decoder * decoder.transpose();
}

void polish(const ConstMatrixMap<float>& decoder, const ConstMatrixMap<float>& gram,
            const Matrix<float>& values, int sweeps, Matrix<float>& bits) {
  Matrix<float> residuals(values.rows(), values.cols()), products;
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    residuals.noalias() = bits * decoder;
    for (Index t = 0; t < values.rows(); ++t) {
      auto residual = residuals.row(t);
      const double scale = best_scale(values.row(t).data(), residual.data(), values.cols());
      const auto factor = static_cast<float>(scale > 0 ? 1 / scale : 0);
      residual = factor * values.row(t) - residual;
    }
    products.noalias() = residuals * decoder.transpose();
    bool flipped = false;
    for (Index t = 0; t < values.rows(); ++t)
      flipped |= flip_bits(gram, products.row(t).data(), bits.row(t).data());
    if (!flipped) break;
  }
}

}  // namespace commvq::value_polish
