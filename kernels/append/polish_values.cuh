#pragma once

#include "common/polish.cuh"

#include "encoder_view.hpp"
#include "load_tokens.cuh"

namespace commvq::cuda {

/// A warp a token: the unit value as a scaled operand in two fp16 numbers.
__global__ void __launch_bounds__(kTokenThreads)
    load_unit_values(const __grid_constant__ EncoderView encoder, const TokenRows rows,
                     Index num_tokens, const double* norms, std::uint16_t* units) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Index token = Index{blockIdx.x} * (kTokenThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (token >= num_tokens) return;
  const int num_inputs = encoder.values.rows.num_inputs;
  const double norm = norms[token];
  std::uint16_t* const hi = units + token * num_inputs;
  std::uint16_t* const lo = hi + num_tokens * num_inputs;
  for (int i = 2 * lane; i < num_inputs; i += 64) {
    float numbers[2] = {};
    for (int k = 0; k < 2; ++k)
      if (i + k < rows.num_channels)
        numbers[k] = encoder.values.unit_scale * unit_value(rows, token, i + k, norm);
    const std::uint32_t rounded = pack_halves(numbers[0], numbers[1]);
    *reinterpret_cast<std::uint32_t*>(hi + i) = rounded;
    *reinterpret_cast<std::uint32_t*>(lo + i) = pack_rests(numbers[0], numbers[1], rounded);
  }
}

/// An epilogue: products [num_rows][num_cols] in fp32.
struct ProductEpilogue {
  float factor;  ///< scaled product -> product
  float* products;
  int num_cols;

  __device__ void operator()(Index row, int col, float first, float second, bool valid) const {
    if (!valid || col >= num_cols) return;  // the number of columns is even
    *reinterpret_cast<float2*>(products + row * num_cols + col) = {factor * first, factor * second};
  }
};

/// A block a token: flips bits [num_tokens][stride] fp16 where that lowers the value's error.
__global__ void __launch_bounds__(kTokenThreads)
    polish_values(const __grid_constant__ EncoderView encoder, const float* value_products,
                  const float* sum_products, std::uint16_t* bits) {
  extern __shared__ __align__(1024) unsigned char shared[];
  constexpr std::uint16_t kOne = 0x3c00;
  const ValueEncoderView& values = encoder.values;
  const int num_bits = values.num_code_bits;
  const PolishShared at(shared, num_bits);
  const Index token = blockIdx.x;
  std::uint16_t* const code = bits + token * values.decoder.num_inputs;
  for (int i = static_cast<int>(threadIdx.x); i < num_bits; i += kTokenThreads) {
    at.of_value[i] = value_products[token * num_bits + i];
    at.of_sum[i] = sum_products[token * num_bits + i];
    at.bits[i] = code[i] != 0 ? 1.0f : 0.0f;
  }
  polish_bits<kTokenThreads>(values.gram_rows, num_bits, values.polish_sweeps, at);
  for (int i = static_cast<int>(threadIdx.x); i < num_bits; i += kTokenThreads)
    code[i] = at.bits[i] > 0 ? kOne : 0;
}

}  // namespace commvq::cuda
