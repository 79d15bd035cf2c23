#pragma once

#include "common/polish.cuh"
#include "encoder_view.hpp"
#include "load_tokens.cuh"

namespace commvq::cuda {

/// An epilogue: products [rows][num_cols] in fp32.
struct ProductEpilogue {
  float factor;  ///< scaled product -> product
  float* products;
  int num_cols;

  __device__ void operator()(int, Index row, int col, float first, float second, bool valid) const {
    const float2 pair{factor * first, factor * second};
    if (valid && col < num_cols)  // the number of columns is even
      *reinterpret_cast<float2*>(products + row * num_cols + col) = pair;
  }
};

/// A warp a row, which is a thread block: flips bits [rows][stride] fp16, or moves numbers of
/// graded codes, where that lowers the error of the block's value. kBits: of a block, 0: any
/// number.
template <int kBits, bool kGraded>
__global__ void __launch_bounds__(32)
    polish_values(const __grid_constant__ EncoderView encoder, Index num_tokens,
                  const float* value_products, const float* sum_products, std::uint16_t* bits) {
  extern __shared__ __align__(1024) unsigned char shared[];
  constexpr std::uint16_t kOne = 0x3c00;
  const ValueEncoderView& values = encoder.values;
  const int num_bits = kBits > 0 ? kBits : values.num_code_bits;
  const Index row = blockIdx.x;
  const float* const gram = values.gram_rows + row / num_tokens * num_bits * num_bits;
  std::uint16_t* const code = bits + row * values.decoder.num_inputs;
  polish_code<kBits, kGraded>(
      gram, num_bits, values.polish_sweeps, value_products + row * num_bits,
      sum_products + row * num_bits, shared, [&](int i) { return code[i] != 0 ? 1.0f : 0.0f; },
      [&](int i, float bit) { code[i] = bit > 0 ? kOne : 0; });
}

/// The kernel for blocks of so many bits.
template <bool kGraded>
auto value_polish_of(int num_bits) {
  return num_bits == 128
             ? polish_values<128, kGraded>
             : (num_bits == 256 ? polish_values<256, kGraded> : polish_values<0, kGraded>);
}
inline auto value_polish(int num_bits, bool graded) {
  return graded ? value_polish_of<true>(num_bits) : value_polish_of<false>(num_bits);
}

}  // namespace commvq::cuda
