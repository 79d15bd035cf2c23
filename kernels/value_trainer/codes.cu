#include "block_sums.cuh"
#include "kernels.hpp"

#include <cuda_bf16.h>

namespace commvq::cuda::value_trainer {
namespace {

/// A block a value. All threads see the same products and decide alike whether a bit is flipped.
__global__ void __launch_bounds__(kThreads)
    polish_kernel(int num_bits, int sweeps, const float* gram, const float* value_products,
                  const float* sum_products, float* bits) {
  extern __shared__ float shared[];  // products of the value, of the sum; the bits
  float* const of_value = shared;
  float* const of_sum = of_value + num_bits;
  float* const b = of_sum + num_bits;
  const Index row = Index{blockIdx.x} * num_bits;
  for (int i = threadIdx.x; i < num_bits; i += kThreads) {
    of_value[i] = value_products[row + i];
    of_sum[i] = sum_products[row + i];
    b[i] = bits[row + i];
  }
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    __syncthreads();
    double square = 0, product = 0;  // |u|^2 and <v, u>
    for (int i = threadIdx.x; i < num_bits; i += kThreads) {
      square += static_cast<double>(of_sum[i]) * b[i];
      product += static_cast<double>(of_value[i]) * b[i];
    }
    square = block_sum(square);
    product = block_sum(product);
    // s = <v, u> / |u|^2 for values of unit norm; 1 / |u| where that is not positive.
    double inverse = 1;
    if (square > 0) inverse = product > 0 ? square / product : sqrt(square);
    bool flipped = false;
    for (int i = 0; i < num_bits; ++i) {
      const float change = b[i] > 0 ? -1.0f : 1.0f;
      const float left = of_value[i] * static_cast<float>(inverse) - of_sum[i];
      const float* const column = gram + Index{i} * num_bits;
      if (!(column[i] - 2 * change * left < 0)) continue;
      __syncthreads();  // all have decided
      for (int j = threadIdx.x; j < num_bits; j += kThreads) {
        of_sum[j] += change * column[j];
        if (j == i) b[i] += change;
      }
      __syncthreads();
      flipped = true;
    }
    if (!flipped) break;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_bits; i += kThreads) bits[row + i] = b[i];
}

__global__ void __launch_bounds__(kThreads)
    scale_kernel(Index C, Index num_bits, const double* norms, const float* units,
                 const float* decoded, float* bits, float* errors) {
  const Index row = blockIdx.x;
  const float* const unit = units + row * C;
  const float* const u = decoded + row * C;
  double square = 0;
  for (Index c = threadIdx.x; c < C; c += kThreads) square += static_cast<double>(u[c]) * u[c];
  const double length = sqrt(block_sum(square)), norm = norms[row];
  const float stored =
      length > 0 ? __bfloat162float(__float2bfloat16(static_cast<float>(norm / length))) : 0.0f;
  const float scale = norm > 0 ? static_cast<float>(stored / norm) : 0.0f;
  float error = 0;
  for (Index c = threadIdx.x; c < C; c += kThreads) {
    const float difference = unit[c] - scale * u[c];
    error += difference * difference;
  }
  error = block_sum(error);
  for (Index i = threadIdx.x; i < num_bits; i += kThreads) bits[row * num_bits + i] *= scale;
  if (threadIdx.x == 0) errors[row] = error;
}

}  // namespace

bool polish(Index tokens, int num_bits, int sweeps, const float* gram, const float* value_products,
            const float* sum_products, float* bits, cudaStream_t stream) {
  const int bytes = 3 * 4 * num_bits;
  if (cudaFuncSetAttribute(polish_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) !=
      cudaSuccess) {
    cudaGetLastError();  // the refusal is the answer
    return false;
  }
  polish_kernel<<<static_cast<unsigned>(tokens), kThreads, static_cast<std::size_t>(bytes),
                  stream>>>(num_bits, sweeps, gram, value_products, sum_products, bits);
  return true;
}

void scale_bits(Index tokens, Index num_channels, Index num_bits, const double* norms,
                const float* units, const float* decoded, float* bits, float* errors,
                cudaStream_t stream) {
  scale_kernel<<<static_cast<unsigned>(tokens), kThreads, 0, stream>>>(
      num_channels, num_bits, norms, units, decoded, bits, errors);
}

}  // namespace commvq::cuda::value_trainer
