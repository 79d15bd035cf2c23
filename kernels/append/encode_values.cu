#include <algorithm>

#include <cuda_runtime.h>

#include "launches.hpp"
#include "matrix_product.cuh"
#include "polish_values.cuh"
#include "tensor_map.hpp"
#include "warpgroup_product.cuh"
#include "write_values.cuh"

namespace commvq::cuda {
namespace {

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
  const MatrixProduct product(weights, inputs, num_blocks, num_tokens, num_terms);
  if (num_tokens <= kSmallTileTokens) {
    launch_product<false>(product, num_blocks, epilogue, stream);
  } else if (encoder.warpgroup_processors == 0 ||
             !launch_warpgroup_product(product, num_blocks, epilogue, encoder.warpgroup_processors,
                                       stream)) {
    launch_product<true>(product, num_blocks, epilogue, stream);
  }
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
  const auto kernel = value_polish(values.num_code_bits, values.graded);
  const auto bytes = static_cast<std::size_t>(polish_shared_bytes(values.num_code_bits));
  kernel<<<static_cast<unsigned>(rows), 32, bytes, params.stream>>>(
      encoder, tokens, workspace.value_products, workspace.sum_products, workspace.bits);
}

}  // namespace

void encode_values(const EncoderView& encoder, const AppendParams& params,
                   const AppendWorkspace& workspace) noexcept {
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

int find_warpgroup_processors(int& processors) noexcept {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaFuncAttributes attributes{};
  if (error == cudaSuccess)
    error = cudaFuncGetAttributes(&attributes, multiply_by_warpgroups<SquaresEpilogue>);
  // Only code for warpgroups has shared memory of its own.
  if (attributes.sharedSizeBytes == 0 || !has_tensor_maps()) processors = 0;
  return static_cast<int>(error);
}

cudaError_t configure_value_kernels(const EncoderView& encoder, int shared_bytes) noexcept {
  cudaError_t error = cudaSuccess;
  const auto allow = [&](auto* kernel, int bytes) {
    if (error == cudaSuccess) error = allow_shared_memory(kernel, bytes);
  };
  for (const int num_bits : {0, 128, 256})
    allow(value_polish(num_bits, encoder.values.graded), shared_bytes);
  const auto allow_products = [&](auto epilogue) {
    using Epilogue = decltype(epilogue);
    allow(multiply<true, Epilogue>, shared_bytes);
    allow(multiply<false, Epilogue>, shared_bytes);
    if (encoder.warpgroup_processors > 0)
      allow(multiply_by_warpgroups<Epilogue>, kWarpgroupSharedBytes);
  };
  allow_products(HiddenEpilogue<false>{});
  allow_products(HiddenEpilogue<true>{});
  allow_products(PatternEpilogue{});
  allow_products(ProductEpilogue{});
  allow_products(SquaresEpilogue{});
  return error;
}

}  // namespace commvq::cuda
