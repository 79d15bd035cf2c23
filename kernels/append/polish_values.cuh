#pragma once

#include "common/polish.cuh"
#include "encoder_view.hpp"
#include "load_tokens.cuh"

namespace commvq::cuda {

/// A warp a row: the unit value as a scaled operand in two fp16 numbers.
__global__ void __launch_bounds__(kTokenThreads)
    load_unit_values(const __grid_constant__ EncoderView encoder, const TokenRows rows,
                     Index num_tokens, const double* norms, std::uint16_t* units) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const ValueEncoderView& values = encoder.values;
  const ValueBlock at(values, num_tokens);
  if (at.block >= values.num_blocks) return;
  const int num_inputs = values.rows.num_inputs;
  const double norm = norms[at.row];
  std::uint16_t* const hi = units + at.row * num_inputs;
  std::uint16_t* const lo = hi + values.num_blocks * num_tokens * num_inputs;
  for (int i = 2 * lane; i < num_inputs; i += 64) {
    float numbers[2] = {};
    for (int k = 0; k < 2; ++k)
      if (i + k < values.num_channels)
        numbers[k] = values.unit_scale * unit_value(rows, at, i + k, norm);
    const std::uint32_t rounded = pack_halves(numbers[0], numbers[1]);
    *reinterpret_cast<std::uint32_t*>(hi + i) = rounded;
    *reinterpret_cast<std::uint32_t*>(lo + i) = pack_rests(numbers[0], numbers[1], rounded);
  }
}

/// An epilogue: products [rows][num_cols] in fp32.
struct ProductEpilogue {
  float factor;  ///< scaled product -> product
  float* products;
  int num_cols;

  __device__ void operator()(int, Index row, int col, float first, float second, bool valid) const {
    if (!valid || col >= num_cols) return;  // the number of columns is even
    *reinterpret_cast<float2*>(products + row * num_cols + col) = {factor * first, factor * second};
  }
};

/// A warp a row, which is a thread block: flips bits [rows][stride] fp16 where that lowers the
/// error of the block's value.
__global__ void __launch_bounds__(32)
    polish_values(const __grid_constant__ EncoderView encoder, Index num_tokens,
                  const float* value_products, const float* sum_products, std::uint16_t* bits) {
  extern __shared__ __align__(1024) unsigned char shared[];
  constexpr std::uint16_t kOne = 0x3c00;
  const ValueEncoderView& values = encoder.values;
  const int num_bits = values.num_code_bits;
  const PolishShared at(shared, num_bits);
  const Index row = blockIdx.x;
  const float* const gram = values.gram_rows + row / num_tokens * num_bits * num_bits;
  std::uint16_t* const code = bits + row * values.decoder.num_inputs;
  for (int i = static_cast<int>(threadIdx.x); i < num_bits; i += 32) {
    at.of_value[i] = value_products[row * num_bits + i];
    at.of_sum[i] = sum_products[row * num_bits + i];
    at.squares[i] = gram[Index{i} * num_bits + i];
    at.bits[i] = code[i] != 0 ? 1.0f : 0.0f;
  }
  polish_bits(gram, num_bits, values.polish_sweeps, at);
  for (int i = static_cast<int>(threadIdx.x); i < num_bits; i += 32)
    code[i] = at.bits[i] > 0 ? kOne : 0;
}

}  // namespace commvq::cuda
