#pragma once

#include "common/bulk_copy.cuh"
#include "matrix_product.cuh"

namespace commvq::cuda {

// Matrix products where warpgroups multiply (sm_90a): of three, one lets the copy engine fetch
// tiles of both operands and leaves its registers to the others, which multiply 64 rows each. A
// block takes tiles in turn, so that its copies for the next tile run while it writes the last.

/// How the copy engine reads a product's operands.
struct ProductMaps {
  CUtensorMap inputs[2];  ///< hi and lo
  CUtensorMap weights[2];
};

inline constexpr int kWarpgroupThreads = 3 * 128;
inline constexpr int kWarpgroupStepBytes = (kWarpgroupTile.rows + kWarpgroupTile.cols) * 128;
/// Steps begin on 1024 bytes, where swizzles do.
inline constexpr int kWarpgroupSharedBytes = kWarpgroupTile.depth * kWarpgroupStepBytes + 1024;

/// The steps of a block's tiles, one after the other, and their place in shared memory.
struct StepTurn {
  int stage = 0, parity = 0;

  __device__ void advance() {
    if (++stage < kWarpgroupTile.depth) return;
    stage = 0;
    parity ^= 1;
  }
};

/// Sums of 64 rows and all columns of a tile handed to the epilogue.
template <class Epilogue>
__device__ __forceinline__ void finish_tile(const MatrixProduct& product, const Epilogue& epilogue,
                                            const float (&sums)[kWarpgroupTile.cols / 8][4],
                                            int block, int first_row, int col_tile) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = first_row + static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;  // and row + 8
  const bool valid[2] = {row < product.num_rows, row + 8 < product.num_rows};
  const Index row_of_all = block * product.num_rows + row;
  if constexpr (std::is_same_v<Epilogue, SquaresEpilogue>) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kWarpgroupTile.cols / 8; ++n)
        sum +=
            sums[n][2 * part] * sums[n][2 * part] + sums[n][2 * part + 1] * sums[n][2 * part + 1];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (valid[part] && lane % 4 == 0)
        epilogue.squares[col_tile * epilogue.num_rows + row_of_all + 8 * part] = sum;
    }
  } else {
    const int first_col = col_tile * kWarpgroupTile.cols + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kWarpgroupTile.cols / 8; ++n)
#pragma unroll
      for (int part = 0; part < 2; ++part)
        epilogue(block, row_of_all + 8 * part, first_col + n * 8, sums[n][2 * part],
                 sums[n][2 * part + 1], valid[part]);
  }
}

/// All tiles of a product: any number of blocks. There is shared memory of the kernel's own only in
/// code for sm_90a; other code does nothing and must not be launched.
template <class Epilogue>
__global__ void __launch_bounds__(kWarpgroupThreads, 1)
    multiply_by_warpgroups([[maybe_unused]] const __grid_constant__ ProductMaps maps,
                           [[maybe_unused]] const MatrixProduct product,
                           [[maybe_unused]] const int num_blocks,
                           [[maybe_unused]] const Epilogue epilogue) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace append_instructions;
  constexpr TileConfig kTile = kWarpgroupTile;
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ std::uint64_t barriers[2 * kTile.depth];
  // The beginning of dynamic shared memory is not on 1024 bytes where there is static memory.
  unsigned char* const steps = shared + (1024 - __cvta_generic_to_shared(shared) % 1024) % 1024;
  const auto filled = [&](int stage) { return Barrier(barriers + stage); };
  const auto emptied = [&](int stage) { return Barrier(barriers + kTile.depth + stage); };
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kTile.depth; ++stage) {
      filled(stage).init(1);
      emptied(stage).init(8);  // warps
    }
    publish_barriers();
  }
  __syncthreads();

  const int col_tiles = product.num_padded_outputs / kTile.cols;
  const int row_tiles = static_cast<int>((product.num_rows + kTile.rows - 1) / kTile.rows);
  const int num_tiles = row_tiles * col_tiles * num_blocks;
  const int steps_per_term = (product.num_inputs + 63) / 64;
  const int num_steps = steps_per_term * product.num_terms;
  const auto for_each_tile = [&](auto use) {
    for (int tile = static_cast<int>(blockIdx.x); tile < num_tiles;
         tile += static_cast<int>(gridDim.x)) {
      const int rest = tile / col_tiles;
      use(rest / row_tiles, rest % row_tiles * kTile.rows, tile % col_tiles);
    }
  };

  StepTurn turn;
  if (warp >= 8) {
    give_registers_up<40>();
    if (threadIdx.x != 2 * 128) return;
    for_each_tile([&](int block, int first_row, int col_tile) {
      for (int step = 0; step < num_steps; ++step, turn.advance()) {
        const int term = step / steps_per_term, input = step % steps_per_term * 64;
        unsigned char* const to = steps + turn.stage * kWarpgroupStepBytes;
        emptied(turn.stage).wait(turn.parity ^ 1);
        filled(turn.stage).arrive_and_expect(kWarpgroupStepBytes);
        copy_box(to, maps.inputs[term == 2 ? 1 : 0], input, first_row, block, filled(turn.stage));
        copy_box(to + kTile.rows * 128, maps.weights[term == 1 ? 1 : 0], input,
                 col_tile * kTile.cols, block, filled(turn.stage));
      }
    });
    return;
  }
  take_registers<232>();
  for_each_tile([&](int block, int first_row, int col_tile) {
    float sums[kTile.cols / 8][4] = {};
    int last_stage = -1;
    for (int step = 0; step < num_steps; ++step, turn.advance()) {
      filled(turn.stage).wait(turn.parity);
      const unsigned char* const from = steps + turn.stage * kWarpgroupStepBytes;
      begin_warpgroup_products();
#pragma unroll
      for (int part = 0; part < 4; ++part)
        warpgroup_multiply_add(sums, operand_descriptor(from + warp / 4 * 64 * 128 + part * 32),
                               operand_descriptor(from + kTile.rows * 128 + part * 32));
      commit_warpgroup_products();
      wait_for_warpgroup_products<1>();  // those of the step before are done
      if (last_stage >= 0 && lane == 0) emptied(last_stage).arrive();
      last_stage = turn.stage;
    }
    finish_warpgroup_products(sums);
    if (lane == 0) emptied(last_stage).arrive();
    finish_tile(product, epilogue, sums, block, first_row, col_tile);
  });
#endif
}

}  // namespace commvq::cuda
