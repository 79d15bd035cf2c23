#include "common/launch.cuh"
#include "decode_attention/binary_attention.cuh"
#include "decode_attention/exact_items.cuh"
#include "decode_attention/kernels.cuh"

namespace commvq::cuda {
namespace {

static_assert(BinaryAttentionConfig::kTileTokens == BinaryKeys::kTileTokens);

/// Thread blocks (part and head, block of rows) attend over coded tokens; they and
/// num_exact_blocks others also over the exact ones.
template <class Shape>
__global__ void __launch_bounds__(BinaryAttentionConfig::kThreads, 1)
    binary_attention_kernel(const __grid_constant__ binary_attention::Arguments arguments) {
  extern __shared__ __align__(128) std::uint8_t binary_memory[];
  const Problem& problem = arguments.problem;
  let_next_kernel_start();
  const int block = static_cast<int>(blockIdx.x);
  if (block == 0 && blockIdx.y == 0)
    for (int i = threadIdx.x; i < problem.num_counters; i += BinaryAttentionConfig::kThreads)
      problem.counters[i] = 0;
  if (block < problem.num_kv_heads * problem.num_key_parts)
    binary_attention::run<Shape>(arguments, binary_memory);
  if (blockIdx.y == 0) run_exact_items<BinaryAttentionConfig::kThreads>(problem, block, binary_memory);
}

template <class Shape>
cudaError_t launch(const binary_attention::Arguments& arguments, dim3 grid, cudaStream_t stream) {
  const auto kernel = binary_attention_kernel<Shape>;
  const int bytes = std::max(static_cast<int>(sizeof(binary_attention::Shared<Shape>)),
                             exact_tokens::Shared<BinaryAttentionConfig::kThreads>::bytes(
                                 arguments.problem.head_dim, arguments.problem.group));
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, BinaryAttentionConfig::kThreads, bytes, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_binary_attention(const binary_attention::Arguments& arguments, dim3 grid,
                                    cudaStream_t stream) {
  using binary_attention::Shape;
  switch (arguments.keys.high_eights) {
    case 3: return launch<Shape<3, 1>>(arguments, grid, stream);
    case 5: return launch<Shape<5, 1>>(arguments, grid, stream);
    default: return launch<Shape<8, 1>>(arguments, grid, stream);
  }
}

}  // namespace commvq::cuda
