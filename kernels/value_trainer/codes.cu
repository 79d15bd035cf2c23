#include <cuda_bf16.h>

#include "block_sums.cuh"
#include "common/polish.cuh"
#include "kernels.hpp"

namespace commvq::cuda::value_trainer {
namespace {

/// A warp a value.
template <bool kGraded>
__global__ void __launch_bounds__(32)
    polish_kernel(int num_bits, int sweeps, const float* gram, const float* value_products,
                  const float* sum_products, float* bits) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Index row = Index{blockIdx.x} * num_bits;
  polish_code<0, kGraded>(
      gram, num_bits, sweeps, value_products + row, sum_products + row, shared,
      [&](int i) { return bits[row + i]; }, [&](int i, float bit) { bits[row + i] = bit; });
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

bool polish(Index tokens, int num_bits, int sweeps, bool graded, const float* gram,
            const float* value_products, const float* sum_products, float* bits,
            cudaStream_t stream) {
  const int bytes = polish_shared_bytes(num_bits);
  const auto kernel = graded ? polish_kernel<true> : polish_kernel<false>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) !=
      cudaSuccess) {
    cudaGetLastError();  // the refusal is the answer
    return false;
  }
  kernel<<<static_cast<unsigned>(tokens), 32, static_cast<std::size_t>(bytes), stream>>>(
      num_bits, sweeps, gram, value_products, sum_products, bits);
  return true;
}

void scale_bits(Index tokens, Index num_channels, Index num_bits, const double* norms,
                const float* units, const float* decoded, float* bits, float* errors,
                cudaStream_t stream) {
  scale_kernel<<<static_cast<unsigned>(tokens), kThreads, 0, stream>>>(
      num_channels, num_bits, norms, units, decoded, bits, errors);
}

}  // namespace commvq::cuda::value_trainer
