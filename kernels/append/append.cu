#include <cuda_runtime.h>

#include "launches.hpp"
#include "load_tokens.cuh"

namespace commvq::cuda {
namespace {

TokenRows rows_of(const EncoderView& encoder, const AppendParams& params, bool keys) {
  const ExactTokens& exact = params.exact;
  TokenRows rows;
  rows.data = keys ? params.keys : params.values;
  rows.type = params.type;
  rows.exact = keys ? exact.keys : exact.values;
  rows.exact_type = exact.type;
  rows.rounds = exact.keys != nullptr;
  rows.exact_mapping = params.exact_mapping;
  rows.num_channels = encoder.num_channels();
  rows.channel_scales = keys ? nullptr : encoder.values.channel_scales;
  return rows;
}

/// Calls `use` with the type as a constant.
template <class Use>
void by_type(FloatType type, Use use) {
  if (type == FloatType::kBf16)
    use(std::integral_constant<FloatType, FloatType::kBf16>{});
  else if (type == FloatType::kFp16)
    use(std::integral_constant<FloatType, FloatType::kFp16>{});
  else
    use(std::integral_constant<FloatType, FloatType::kFp32>{});
}

/// What the searches and networks begin with.
void load(const EncoderView& encoder, const AppendParams& params,
          const AppendWorkspace& workspace) {
  const int key_parts = params.keys != nullptr ? encoder.layout.norms_per_token : 0;
  const int value_parts = params.values != nullptr ? encoder.values.num_blocks : 0;
  if (key_parts + value_parts == 0) return;
  const dim3 grid(blocks_for(params.num_tokens, kTokenThreads / 32),
                  static_cast<unsigned>(key_parts + value_parts));
  by_type(params.type, [&](auto type) {
    load_tokens<type.value><<<grid, kTokenThreads, 0, params.stream>>>(
        encoder, rows_of(encoder, params, true), rows_of(encoder, params, false), params.num_tokens,
        key_parts, params.pages, params.slot_mapping, workspace);
  });
}

/// Exact copies alone.
void copy(const EncoderView& encoder, const AppendParams& params) {
  by_type(params.type, [&](auto type) {
    copy_tokens<type.value>
        <<<blocks_for(params.num_tokens, kTokenThreads / 32), kTokenThreads, 0, params.stream>>>(
            rows_of(encoder, params, true), rows_of(encoder, params, false), params.num_tokens);
  });
}

Status invalid(const char* what, const char* wanted) {
  return Status(StatusCode::kInvalidArgument, "%s; %s", what, wanted);
}

bool is_aligned(const void* pointer, std::uintptr_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

Status check(const EncoderView& encoder, const AppendParams& params) {
  const DevicePageLayout& layout = encoder.layout;
  if (params.num_tokens < 0 || params.num_tokens > kMaxTokens)
    return Status(StatusCode::kInvalidArgument, "num_tokens is %lld; it must be in [0, %lld]",
                  static_cast<long long>(params.num_tokens), static_cast<long long>(kMaxTokens));
  if (params.num_tokens == 0) return {};
  if (params.type != FloatType::kBf16 && params.type != FloatType::kFp16 &&
      params.type != FloatType::kFp32)
    return Status(StatusCode::kInvalidArgument, "type is %d; it must be kBf16, kFp16 or kFp32",
                  static_cast<int>(params.type));
  if (!is_aligned(params.keys, 16) || !is_aligned(params.values, 16))
    return invalid("keys or values are not on 16 bytes", "rows are read 16 bytes at a time");
  const ExactTokens& exact = params.exact;
  if (!is_aligned(exact.keys, 16) || !is_aligned(exact.values, 16))
    return invalid("exact.keys or exact.values is not on 16 bytes",
                   "rows are written 16 bytes at a time");
  if ((exact.keys == nullptr) != (exact.values == nullptr))
    return invalid("one of exact.keys and exact.values is null", "give both or none");
  if (exact.keys != nullptr && exact.type != FloatType::kBf16 && exact.type != FloatType::kFp16)
    return Status(StatusCode::kInvalidArgument, "exact.type is %s; it must be bf16 or fp16",
                  name_of(exact.type));
  if (exact.keys == nullptr && params.exact_mapping != nullptr)
    return invalid("exact_mapping is given, but no exact buffers",
                   "set exact.keys and exact.values");
  if (params.slot_mapping == nullptr)
    return params.exact_mapping != nullptr
               ? Status()
               : invalid("slot_mapping and exact_mapping are null",
                         "a token needs a place for its codes or for an exact copy");
  if (params.pages.data == nullptr || !is_aligned(params.pages.data, 16))
    return invalid("pages.data is null or not on 16 bytes", "pages begin on 16 bytes");
  if (params.pages.page_stride < layout.page_bytes || params.pages.page_stride % 16 != 0)
    return Status(StatusCode::kInvalidArgument,
                  "page_stride is %lld; it must be a multiple of 16 and at least page_bytes = %lld",
                  static_cast<long long>(params.pages.page_stride),
                  static_cast<long long>(layout.page_bytes));
  if (params.workspace == nullptr || !is_aligned(params.workspace, 256))
    return invalid("workspace is null or not on 256 bytes", "see append_workspace_size");
  const std::size_t needed = AppendWorkspace(encoder, params.num_tokens, nullptr).bytes;
  if (params.workspace_bytes < needed)
    return Status(StatusCode::kWorkspaceTooSmall,
                  "the workspace has %zu bytes; %lld tokens need %zu", params.workspace_bytes,
                  static_cast<long long>(params.num_tokens), needed);
  return {};
}

}  // namespace

int configure_append_kernels(const EncoderView& encoder) noexcept {
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = configure_value_kernels(encoder, bytes);
  if (error == cudaSuccess) error = configure_key_kernels(encoder, bytes);
  return static_cast<int>(error);
}

std::size_t append_workspace_size(const DeviceEncoder& encoder, Index max_tokens) noexcept {
  return AppendWorkspace(encoder.view(), max_tokens < 0 ? 0 : max_tokens, nullptr).bytes;
}

Status append(const DeviceEncoder& encoder, const AppendParams& params) noexcept {
  const EncoderView& view = encoder.view();
  const Status status = check(view, params);
  if (!status.ok() || params.num_tokens == 0) return status;
  if (params.slot_mapping == nullptr) {
    copy(view, params);
  } else {
    const AppendWorkspace workspace(view, params.num_tokens, params.workspace);
    load(view, params, workspace);
    if (params.keys != nullptr) encode_keys(view, params, workspace);
    if (params.values != nullptr) encode_values(view, params, workspace);
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    return Status(StatusCode::kCudaError, "append: %s", cudaGetErrorString(error));
  return {};
}

}  // namespace commvq::cuda
