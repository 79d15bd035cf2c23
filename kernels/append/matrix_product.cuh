#pragma once

#include "encoder_view.hpp"
#include "instructions.cuh"

namespace commvq::cuda {

/// Operands of outputs = inputs weights^T for each of some blocks: `inputs` [blocks][num_rows]
/// [num_inputs], `weights` [blocks][num_padded_outputs][num_inputs], fp16, num_inputs a multiple of
/// 32. With three terms each is the sum of hi and lo, and the product hi hi + hi lo + lo hi.
struct MatrixProduct {
  const std::uint16_t* inputs_hi;
  const std::uint16_t* inputs_lo;
  const std::uint16_t* weights_hi;
  const std::uint16_t* weights_lo;
  Index num_rows;
  int num_inputs;
  int num_padded_outputs;
  int num_terms;  ///< 1 or 3; 2: the inputs have no rest

  /// Of each of `num_blocks` blocks; `inputs` is [2][num_blocks][num_rows][num_inputs], numbers and
  /// then rests.
  MatrixProduct(const Weights& weights, const std::uint16_t* inputs, int num_blocks, Index rows,
                int terms)
      : inputs_hi(inputs),
        inputs_lo(inputs + num_blocks * rows * weights.num_inputs),
        weights_hi(weights.hi),
        weights_lo(weights.lo),
        num_rows(rows),
        num_inputs(weights.num_inputs),
        num_padded_outputs(weights.num_padded_outputs),
        num_terms(terms) {}
};

/// GELU, as the host computes it in float: x Phi(x), where the tail 1 - Phi(|x|) is taken off |x|.
__device__ __forceinline__ float gelu(float x) {
  using namespace append_instructions;
  constexpr float kHalfLog2E = 0.72134752f;
  const float bell = fast_exp2(-kHalfLog2E * x * x);
  const float t = fast_reciprocal(1.0f + 0.3275911f * 0.70710678f * fabsf(x));
  const float series =
      0.127414796f +
      t * (-0.142248368f + t * (0.7107068705f + t * (-0.7265760135f + t * 0.5307027145f)));
  return fmaxf(x, 0.0f) - fabsf(x) * (t * series * bell);
}

__device__ __forceinline__ std::uint32_t pack_halves(float first, float second) {
  using append_instructions::to_half;
  return to_half(first) | static_cast<std::uint32_t>(to_half(second)) << 16;
}
/// What fp16 leaves of two numbers, as fp16.
__device__ __forceinline__ std::uint32_t pack_rests(float first, float second,
                                                    std::uint32_t rounded) {
  using append_instructions::from_half;
  return pack_halves(first - from_half(static_cast<std::uint16_t>(rounded)),
                     second - from_half(static_cast<std::uint16_t>(rounded >> 16)));
}

/// An epilogue gets two neighbouring outputs of row block * num_rows + i; all lanes of a warp call
/// it together, with i beyond the last one too. Nothing but the write depends on `valid`, so that
/// calls for several outputs run side by side. Writes hidden = GELU(product + bias).
template <bool kHasRest>
struct HiddenEpilogue {
  Weights weights;
  float scale;  ///< of what is written
  std::uint16_t* hi;
  std::uint16_t* lo;  ///< not read unless kHasRest
  int num_cols;       ///< of the array written: inputs of the next layer, zeros at its end

  __device__ void operator()(int block, Index row, int col, float first, float second,
                             bool valid) const {
    // Padded outputs have weight and bias 0, and GELU(0) = 0.
    const float2 bias = __ldg(
        reinterpret_cast<const float2*>(weights.bias + block * weights.num_padded_outputs + col));
    first = scale * gelu(first * weights.product_factor + bias.x);
    second = scale * gelu(second * weights.product_factor + bias.y);
    const std::uint32_t rounded = pack_halves(first, second);
    const std::uint32_t rest = kHasRest ? pack_rests(first, second, rounded) : 0;
    const bool writes = valid && col < num_cols;
    if (writes) *reinterpret_cast<std::uint32_t*>(hi + row * num_cols + col) = rounded;
    if (kHasRest && writes) *reinterpret_cast<std::uint32_t*>(lo + row * num_cols + col) = rest;
  }
};

/// Picks the pattern of the largest of four logits, the first of equals: 0 = (1,0), 1 = (0,1),
/// 2 = (1,1), 3 = (0,0). Writes the two bits as fp16.
struct PatternEpilogue {
  Weights weights;
  std::uint16_t* bits;
  int num_cols;  ///< of `bits`: a multiple of 32, zeros at its end

  __device__ void operator()(int block, Index row, int col, float first, float second,
                             bool valid) const {
    const float2 bias = __ldg(
        reinterpret_cast<const float2*>(weights.bias + block * weights.num_padded_outputs + col));
    first = first * weights.product_factor + bias.x;
    second = second * weights.product_factor + bias.y;
    const float third = __shfl_down_sync(0xffffffffu, first, 1);
    const float fourth = __shfl_down_sync(0xffffffffu, second, 1);
    constexpr std::uint32_t kOne = 0x3c00;
    std::uint32_t pair = second > first ? kOne << 16 : kOne;
    float largest = fmaxf(first, second);
    if (third > largest) pair = kOne << 16 | kOne;
    largest = fmaxf(largest, third);
    if (fourth > largest || col >= weights.num_outputs) pair = 0;
    if (valid && col % 4 == 0 && col / 2 < num_cols)
      *reinterpret_cast<std::uint32_t*>(bits + row * num_cols + col / 2) = pair;
  }
};

/// Writes each row's sum of squares over a tile's columns.
struct SquaresEpilogue {
  float* squares;  ///< [column tiles][rows of all blocks]
  Index num_rows;  ///< of all blocks
  __device__ void operator()(int, Index, int, float, float, bool) const {}
};

/// Adds one step's products of a warp's part of the tile. `from` is the step in shared memory: the
/// tile's rows of inputs, then its rows of weights.
template <TileConfig kTile, int kM, int kN>
__device__ __forceinline__ void multiply_step(float (&sums)[kM][kN][4], const unsigned char* from,
                                              int warp_row, int warp_col, int lane) {
  using namespace append_instructions;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    std::uint32_t a[kM][4], b[kN / 2][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int row = warp_row + m * 16 + lane % 16;
      const int piece = half * 2 + lane / 16;
      load_matrices(a[m], from + row * 64 + (piece ^ (row / 2 % 4)) * 16);
    }
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {  // columns n * 16 .. + 8: b[0], b[1]; + 8 .. 16: b[2], b[3]
      const int row = kTile.rows + warp_col + n * 16 + lane / 16 * 8 + lane % 8;
      const int piece = half * 2 + lane / 8 % 2;
      load_matrices(b[n], from + row * 64 + (piece ^ (row / 2 % 4)) * 16);
    }
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
        multiply_add(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
  }
}

/// One tile of a product: grid (column tiles, row tiles, blocks). Copies of `kTile.depth` steps of
/// 32 inputs are in flight; 16-byte piece p of row r of a step lies at piece p ^ (r / 2 % 4), so
/// that neither copies nor `load_matrices` meet bank conflicts.
template <bool kLarge, class Epilogue>
__global__ void __launch_bounds__(kTileThreads<kLarge>)
    multiply(const MatrixProduct product, const Epilogue epilogue) {
  using namespace append_instructions;
  constexpr TileConfig kTile = kTileOf<kLarge>;
  constexpr int kAhead = kTile.depth - 1;
  constexpr int kThreads = kTileThreads<kLarge>;
  constexpr int kWarpCols = kTile.cols / kTile.warp_cols;
  constexpr int kM = kTile.warp_rows / 16, kN = kTile.warp_cols / 8;
  constexpr int kStepBytes = (kTile.rows + kTile.cols) * 64;
  constexpr bool kSquares = std::is_same_v<Epilogue, SquaresEpilogue>;
  static_assert(kN % 2 == 0);
  extern __shared__ __align__(1024) unsigned char shared[];

  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / kWarpCols * kTile.warp_rows;
  const int warp_col = warp % kWarpCols * kTile.warp_cols;
  const int block = static_cast<int>(blockIdx.z);
  const Index row_of_block = block * product.num_rows;
  const Index weights_of_block = Index{block} * product.num_padded_outputs * product.num_inputs;
  const Index first_row = Index{blockIdx.y} * kTile.rows;
  const Index first_col = Index{blockIdx.x} * kTile.cols;
  const int steps_per_term = product.num_inputs / 32;
  const int num_steps = steps_per_term * product.num_terms;

  const auto start_step = [&](int step) {
    if (step < num_steps) {
      const int term = step / steps_per_term;
      const int input = step % steps_per_term * 32;
      const std::uint16_t* const inputs =
          (term == 2 ? product.inputs_lo : product.inputs_hi) + row_of_block * product.num_inputs;
      const std::uint16_t* const weights =
          (term == 1 ? product.weights_lo : product.weights_hi) + weights_of_block;
      unsigned char* const to = shared + step % kTile.depth * kStepBytes;
#pragma unroll
      for (int i = thread; i < (kTile.rows + kTile.cols) * 4; i += kThreads) {
        const int row = i / 4, piece = i % 4;
        unsigned char* const at = to + row * 64 + (piece ^ (row / 2 % 4)) * 16;
        if (row < kTile.rows) {
          const bool valid = first_row + row < product.num_rows;
          const Index from = valid ? first_row + row : 0;
          copy_async_16(at, inputs + from * product.num_inputs + input + piece * 8, valid);
        } else {
          copy_async_16(
              at, weights + (first_col + row - kTile.rows) * product.num_inputs + input + piece * 8,
              true);
        }
      }
    }
    commit_copies();
  };

  float sums[kM][kN][4] = {};
#pragma unroll
  for (int step = 0; step < kAhead; ++step) start_step(step);
  for (int step = 0; step < num_steps; ++step) {
    wait_for_copies<kAhead - 1>();
    __syncthreads();
    start_step(step + kAhead);  // overwrites what all warps have read before the barrier
    const unsigned char* const from = shared + step % kTile.depth * kStepBytes;
    multiply_step<kTile, kM, kN>(sums, from, warp_row, warp_col, lane);
  }

  if constexpr (kSquares) {
    wait_for_copies<0>();
    __syncthreads();
    auto* const partial = reinterpret_cast<float*>(shared);  // [kWarpCols][rows]
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kN; ++n)
          sum += sums[m][n][2 * part] * sums[m][n][2 * part] +
                 sums[m][n][2 * part + 1] * sums[m][n][2 * part + 1];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const int row = warp_row + m * 16 + part * 8 + lane / 4;
        if (lane % 4 == 0) partial[warp % kWarpCols * kTile.rows + row] = sum;
      }
    __syncthreads();
    for (int row = thread; row < kTile.rows; row += kThreads) {
      if (first_row + row >= product.num_rows) continue;
      float sum = 0;
      for (int w = 0; w < kWarpCols; ++w) sum += partial[w * kTile.rows + row];
      epilogue.squares[Index{blockIdx.x} * epilogue.num_rows + row_of_block + first_row + row] =
          sum;
    }
  } else {
    wait_for_copies<0>();
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const Index row = first_row + warp_row + m * 16 + part * 8 + lane / 4;
#pragma unroll
        for (int n = 0; n < kN; ++n)
          epilogue(block, row_of_block + row,
                   static_cast<int>(first_col) + warp_col + n * 8 + lane % 4 * 2,
                   sums[m][n][2 * part], sums[m][n][2 * part + 1], row < product.num_rows);
      }
  }
}

}  // namespace commvq::cuda
