#include "tensor_map.hpp"

#include <cuda_runtime_api.h>

namespace commvq::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

/// The driver's function, so that nothing needs to be linked with the driver; null: it has none.
Encode find_encode() noexcept {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) cudaGetLastError();  // the answer is null
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<Encode>(function)
             : nullptr;
}

Encode encode() noexcept {
  static const Encode function = find_encode();
  return function;
}

}  // namespace

bool has_tensor_maps() noexcept {
  return encode() != nullptr;
}

bool make_operand_map(CUtensorMap& map, const std::uint16_t* data, Index num_inputs, Index num_rows,
                      Index num_blocks, int box_rows) noexcept {
  const auto inputs = static_cast<cuuint64_t>(num_inputs), rows = static_cast<cuuint64_t>(num_rows);
  const cuuint64_t sizes[3] = {inputs, rows, static_cast<cuuint64_t>(num_blocks)};
  const cuuint64_t strides[2] = {inputs * 2, rows * inputs * 2};  // bytes
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  return encode()(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, const_cast<std::uint16_t*>(data), sizes,
                  strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace commvq::cuda
