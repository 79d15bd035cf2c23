#include <algorithm>

#include <cuda_runtime.h>

#include "beam_search.cuh"
#include "binary_search.cuh"
#include "greedy_search.cuh"
#include "key_search.cuh"
#include "load_tokens.cuh"
#include "matrix_product.cuh"
#include "polish_values.cuh"
#include "tensor_map.hpp"
#include "warpgroup_product.cuh"

namespace commvq::cuda {
namespace {

unsigned blocks_for(Index count, Index per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

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

template <bool kLarge, class Epilogue>
void launch_product(const MatrixProduct& product, int num_blocks, const Epilogue& epilogue,
                    cudaStream_t stream) {
  constexpr TileConfig kTile = kTileOf<kLarge>;
  const dim3 grid(static_cast<unsigned>(product.num_padded_outputs / kTile.cols),
                  blocks_for(product.num_rows, kTile.rows), static_cast<unsigned>(num_blocks));
  multiply<kLarge>
      <<<grid, kTile.num_threads(), static_cast<std::size_t>(kTile.shared_bytes()), stream>>>(
          product, epilogue);
}

/// False where the driver makes no maps of these operands.
template <class Epilogue>
bool launch_warpgroup_product(const MatrixProduct& product, int num_blocks,
                              const Epilogue& epilogue, int num_processors, cudaStream_t stream) {
  constexpr TileConfig kTile = kWarpgroupTile;
  ProductMaps maps{};
  const auto make_map = [&](CUtensorMap& map, const std::uint16_t* data, Index rows, int box) {
    return make_operand_map(map, data, product.num_inputs, rows, num_blocks, box);
  };
  const auto make_maps = [&](int part, const std::uint16_t* inputs, const std::uint16_t* weights) {
    return make_map(maps.inputs[part], inputs, product.num_rows, kTile.rows) &&
           make_map(maps.weights[part], weights, product.num_padded_outputs, kTile.cols);
  };
  if (!make_maps(0, product.inputs_hi, product.weights_hi)) return false;
  // Inputs without a rest are not read a third time.
  const std::uint16_t* const inputs_lo =
      product.num_terms == 3 ? product.inputs_lo : product.inputs_hi;
  if (product.num_terms > 1 && !make_maps(1, inputs_lo, product.weights_lo)) return false;
  const Index num_tiles = Index{blocks_for(product.num_rows, kTile.rows)} *
                          (product.num_padded_outputs / kTile.cols) * num_blocks;
  const auto grid = static_cast<unsigned>(std::min<Index>(num_tiles, num_processors));
  multiply_by_warpgroups<<<grid, kWarpgroupThreads, std::size_t{kWarpgroupSharedBytes}, stream>>>(
      maps, product, num_blocks, epilogue);
  return true;
}

template <class Epilogue>
void multiply_by(const EncoderView& encoder, const Weights& weights, const std::uint16_t* inputs,
                 Index num_tokens, int num_terms, const Epilogue& epilogue, cudaStream_t stream) {
  const int num_blocks = encoder.values.num_blocks;
  const MatrixProduct product{inputs,
                              inputs + num_blocks * num_tokens * weights.num_inputs,
                              weights.hi,
                              weights.lo,
                              num_tokens,
                              weights.num_inputs,
                              weights.num_padded_outputs,
                              num_terms};
  if (num_tokens <= kSmallTileTokens) {
    launch_product<false>(product, num_blocks, epilogue, stream);
  } else if (encoder.warpgroup_processors == 0 ||
             !launch_warpgroup_product(product, num_blocks, epilogue, encoder.warpgroup_processors,
                                       stream)) {
    launch_product<true>(product, num_blocks, epilogue, stream);
  }
}

template <int kNumRows>
auto key_search(KeySearchKind kind) {
  switch (kind) {
    case KeySearchKind::kBeam:
      return search_key_codes<KeySearchKind::kBeam, kNumRows>;
    case KeySearchKind::kGreedy:
      return search_key_codes<KeySearchKind::kGreedy, kNumRows>;
    default:
      return search_key_codes<KeySearchKind::kScreenedGreedy, kNumRows>;
  }
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

auto binary_search(const KeyEncoderView& keys) {
  return keys.binary.num_bytes <= 16 ? search_binary_codes<1> : search_binary_codes<2>;
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

using SearchKernel = void(EncoderView, Index, const float*, const std::uint16_t*, PagedCodes,
                          const std::int64_t*);

/// A search for key codes and what a block of it takes.
struct KeySearchLaunch {
  SearchKernel* kernel = nullptr;  ///< null: none
  int num_tokens = 0;
  int shared_bytes = 0;
};

/// The search by warpgroups, where there is one for these codes.
KeySearchLaunch warpgroup_search(const EncoderView& encoder) {
  const KeyEncoderView& keys = encoder.keys;
  if (keys.search_stages == nullptr || encoder.warpgroup_processors == 0) return {};
  if (keys.beam_width == 1 && keys.books_are_tied)
    return {search_greedy_codes, kWarpgroupSearch.num_rows,
            GreedySearchShared(encoder.layout.num_books).bytes};
  if (keys.books_are_tied)
    return {search_beam_codes<true>, BeamSearchShared<true>::kNumTokens,
            BeamSearchShared<true>(keys.num_stages).bytes};
  return {search_beam_codes<false>, BeamSearchShared<false>::kNumTokens,
          BeamSearchShared<false>(keys.num_stages).bytes};
}

void encode_keys(const EncoderView& encoder, const AppendParams& params,
                 const AppendWorkspace& workspace) {
  const Index tokens = params.num_tokens;
  if (encoder.keys.binary.num_bytes > 0) {
    const auto kernel = binary_search(encoder.keys);
    const dim3 grid(blocks_for(tokens, kBinarySearch.num_tokens),
                    static_cast<unsigned>(encoder.layout.num_kv_heads));
    kernel<<<grid, kBinarySearch.num_threads,
             static_cast<std::size_t>(BinarySearchShared(encoder.keys).bytes), params.stream>>>(
        encoder, tokens, workspace.unit_keys, workspace.key_norms, params.pages,
        params.slot_mapping);
    return;
  }
  if (const auto by_warpgroups = warpgroup_search(encoder); by_warpgroups.kernel != nullptr) {
    const dim3 grid(blocks_for(tokens, by_warpgroups.num_tokens),
                    static_cast<unsigned>(encoder.layout.num_kv_heads),
                    static_cast<unsigned>(encoder.layout.num_groups));
    by_warpgroups.kernel<<<grid, kWarpgroupSearch.num_threads,
                           static_cast<std::size_t>(by_warpgroups.shared_bytes), params.stream>>>(
        encoder, tokens, workspace.unit_keys, workspace.key_norms, params.pages,
        params.slot_mapping);
    return;
  }
  const int num_rows = encoder.keys.num_search_rows;
  const dim3 grid(blocks_for(tokens, num_rows / encoder.keys.beam_width),
                  static_cast<unsigned>(encoder.layout.num_kv_heads),
                  static_cast<unsigned>(encoder.layout.num_groups));
  const auto kernel = num_rows == kKeySearch.num_rows
                          ? key_search<kKeySearch.num_rows>(search_kind(encoder.keys))
                          : key_search<kKeySearch.num_rows_small>(search_kind(encoder.keys));
  const auto bytes = static_cast<std::size_t>(KeySearchShared(encoder.keys, num_rows).bytes);
  kernel<<<grid, kKeySearch.num_threads, bytes, params.stream>>>(
      encoder, tokens, workspace.unit_keys, workspace.key_norms, params.pages, params.slot_mapping);
}

auto value_polish(int num_bits) {
  return num_bits == 128 ? polish_values<128>
                         : (num_bits == 256 ? polish_values<256> : polish_values<0>);
}

/// Replaces the network's bits by better ones.
void polish(const EncoderView& encoder, const AppendParams& params,
            const AppendWorkspace& workspace) {
  const Index tokens = params.num_tokens;
  const ValueEncoderView& values = encoder.values;
  const Index rows = tokens * values.num_blocks;
  multiply_by(
      encoder, values.rows, workspace.units, tokens, 3,
      ProductEpilogue{values.rows.product_factor, workspace.value_products, values.num_code_bits},
      params.stream);
  multiply_by(
      encoder, values.gram, workspace.bits, tokens, 2,
      ProductEpilogue{values.gram.product_factor, workspace.sum_products, values.num_code_bits},
      params.stream);
  const auto kernel = value_polish(values.num_code_bits);
  const auto bytes = static_cast<std::size_t>(polish_shared_bytes(values.num_code_bits));
  kernel<<<static_cast<unsigned>(rows), 32, bytes, params.stream>>>(
      encoder, tokens, workspace.value_products, workspace.sum_products, workspace.bits);
}

void encode_values(const EncoderView& encoder, const AppendParams& params,
                   const AppendWorkspace& workspace) {
  const Index tokens = params.num_tokens;
  const ValueEncoderView& values = encoder.values;
  const int terms = values.num_terms();
  const Index rows = tokens * values.num_blocks;
  const dim3 parts(blocks_for(tokens, kTokenThreads / 32),
                   static_cast<unsigned>(values.num_blocks));
  const auto multiply_hidden = [&](auto has_rest) {
    std::uint16_t* const rest = workspace.hidden + rows * values.output.num_inputs;
    multiply_by(encoder, values.hidden, workspace.inputs, tokens, terms,
                HiddenEpilogue<has_rest.value>{values.hidden, values.hidden_scale, workspace.hidden,
                                               rest, values.output.num_inputs},
                params.stream);
  };
  if (terms > 1)
    multiply_hidden(std::true_type{});
  else
    multiply_hidden(std::false_type{});
  multiply_by(encoder, values.output, workspace.hidden, tokens, terms,
              PatternEpilogue{values.output, workspace.bits, values.decoder.num_inputs},
              params.stream);
  if (values.polish_sweeps > 0) polish(encoder, params, workspace);
  // Bits have no rest, so that of three terms two are left.
  multiply_by(encoder, values.decoder, workspace.bits, tokens, terms > 1 ? 2 : 1,
              SquaresEpilogue{workspace.squares, rows}, params.stream);
  const int tile_cols = tokens <= kSmallTileTokens ? kSmallTile.cols : kLargeTile.cols;
  write_values<<<parts, kTokenThreads, 0, params.stream>>>(
      encoder, tokens, workspace.value_norms, workspace.bits, workspace.squares,
      values.decoder.num_padded_outputs / tile_cols, params.pages, params.slot_mapping);
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

template <class Kernel>
cudaError_t allow_shared_memory(Kernel* kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace

int configure_append_kernels(EncoderView& encoder) noexcept {
  int device = 0, bytes = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaFuncAttributes attributes{};
  if (error == cudaSuccess)
    error = cudaFuncGetAttributes(&attributes, multiply_by_warpgroups<SquaresEpilogue>);
  const bool has_warpgroups = attributes.sharedSizeBytes > 0 && has_tensor_maps();
  encoder.warpgroup_processors = has_warpgroups ? processors : 0;
  const auto allow = [&](auto* kernel) {
    if (error == cudaSuccess) error = allow_shared_memory(kernel, bytes);
  };
  for (const KeySearchKind kind :
       {KeySearchKind::kBeam, KeySearchKind::kGreedy, KeySearchKind::kScreenedGreedy}) {
    allow(key_search<kKeySearch.num_rows>(kind));
    allow(key_search<kKeySearch.num_rows_small>(kind));
  }
  if (warpgroup_search(encoder).shared_bytes > bytes) encoder.keys.search_stages = nullptr;
  allow(search_greedy_codes);
  allow(search_beam_codes<true>);
  allow(search_beam_codes<false>);
  allow(search_binary_codes<1>);
  allow(search_binary_codes<2>);
  for (const int num_bits : {0, 128, 256}) allow(value_polish(num_bits));
  const auto allow_products = [&](auto epilogue) {
    using Epilogue = decltype(epilogue);
    allow(multiply<true, Epilogue>);
    allow(multiply<false, Epilogue>);
    if (error == cudaSuccess && has_warpgroups)
      error = allow_shared_memory(multiply_by_warpgroups<Epilogue>, kWarpgroupSharedBytes);
  };
  allow_products(HiddenEpilogue<false>{});
  allow_products(HiddenEpilogue<true>{});
  allow_products(PatternEpilogue{});
  allow_products(ProductEpilogue{});
  allow_products(SquaresEpilogue{});
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
