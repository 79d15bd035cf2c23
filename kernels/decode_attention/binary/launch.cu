#include <type_traits>

#include "common/launch.cuh"
#include "decode_attention/binary/attention.cuh"
#include "decode_attention/binary/shared_bytes.hpp"
#include "decode_attention/combine.cuh"
#include "decode_attention/exact_tokens.cuh"
#include "decode_attention/kernels.cuh"

namespace commvq::cuda {
namespace {

static_assert(BinaryAttentionConfig::kTileTokens == BinaryKeys::kTileTokens);
static_assert(binary_attention::kRoundTokens == BinaryKeys::kTurnTokens);

/// Whether devices of the compiled compute capability can have the shared memory; `prepare` refuses
/// the others, for which no code is made.
template <class Shape>
constexpr bool kFits =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    sizeof(binary_attention::Shared<Shape>) <= 163 * 1024;
#else
    true;
#endif

/// Thread blocks (part and head, block of rows) attend over coded tokens; they and
/// num_exact_blocks others also over the exact ones.
template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    binary_attention_kernel(const __grid_constant__ binary_attention::Arguments arguments) {
  extern __shared__ __align__(128) std::uint8_t binary_memory[];
  const Problem& problem = arguments.problem;
  let_next_kernel_start();
  const int block = static_cast<int>(blockIdx.x);
  if (block < problem.num_kv_heads * problem.num_key_parts) {
    if constexpr (kFits<Shape>) binary_attention::run<Shape>(arguments, binary_memory);
  } else {
    wait_for_previous_kernel();
  }
  if (blockIdx.y == 0)
    exact_tokens::run_items<Shape::kThreads, BinaryKeys::kPairs / 32>(problem, block);
}

/// Calls `visit` with the `Shape` of the keys.
template <class Visit>
auto with_shape(const BinaryKeys& keys, Visit visit) {
  const auto with_words = [&](auto high_eights, auto graded) {
    using binary_attention::Shape;
    constexpr int kHighEights = decltype(high_eights)::value;
    constexpr bool kGraded = decltype(graded)::value;
    if (keys.lane_words == 1) return visit(Shape<kHighEights, 1, kGraded>{});
    return visit(Shape<kHighEights, 2, kGraded>{});
  };
  const auto with_eights = [&](auto graded) {
    if (keys.high_eights == 3) return with_words(std::integral_constant<int, 3>{}, graded);
    if (keys.high_eights == 5) return with_words(std::integral_constant<int, 5>{}, graded);
    return with_words(std::integral_constant<int, 8>{}, graded);
  };
  return keys.graded ? with_eights(std::true_type{}) : with_eights(std::false_type{});
}

template <class Shape>
cudaError_t launch(const binary_attention::Arguments& arguments, const float* decoder,
                   cudaStream_t stream) {
  const Problem& p = arguments.problem;
  constexpr int kRows = BinaryAttentionConfig::kRows;
  const auto row_blocks = static_cast<unsigned>((p.rows_per_head + kRows - 1) / kRows);
  const auto heads = static_cast<unsigned>(p.num_kv_heads);
  const dim3 grid(
      heads * static_cast<unsigned>(p.num_key_parts) + static_cast<unsigned>(p.num_exact_blocks),
      row_blocks);
  const auto kernel = binary_attention_kernel<Shape>;
  const int bytes = static_cast<int>(sizeof(binary_attention::Shared<Shape>));
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess)
    error = launch_early(kernel, grid, Shape::kThreads, bytes, stream, arguments);
  if (error != cudaSuccess) return error;
  return combine::launch<combine::HeadSums<Shape::kValueSums>>(p, decoder, stream);
}

}  // namespace

cudaError_t launch_binary_attention(const binary_attention::Arguments& arguments,
                                    const float* decoder, cudaStream_t stream) {
  return with_shape(arguments.keys, [&](auto shape) {
    return launch<decltype(shape)>(arguments, decoder, stream);
  });
}

int binary_attention_bytes(const BinaryKeys& keys) {
  return with_shape(keys, [](auto shape) {
    return static_cast<int>(sizeof(binary_attention::Shared<decltype(shape)>));
  });
}

}  // namespace commvq::cuda
