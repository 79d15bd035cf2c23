#pragma once

#include "common/launch.cuh"
#include "common/memory.cuh"
#include "common/mma.cuh"
#include "common/wgmma.cuh"
#include "decode_attention/config.hpp"
#include "decode_attention/problem.cuh"

/// Sums of value codes, sum over tokens of weight * b, for the rows of all heads at once: every
/// code bit matters to every head, so a bit that was expanded serves 32 rows.
///
/// A 32-bit word holds one code bit of tokens 0 to 15 (low half) and 16 to 31 (high half) of a
/// block. A mask leaves bit s of either half: as fp16 numbers these are bit * 2^(s - 24), operands
/// of a matrix product as they are. The weights take 2^(3 - s % 4) to make up for it: the word is
/// shifted by whole fours.
///
/// A thread block works in rounds of some blocks. Each of its warps has some bits of them all; all
/// warps together bring the next round's weights to the rows' maxima, into shared memory, where
/// they are the other operand of every warp.
namespace commvq::cuda::value_sums {

using Config = ValueSumsConfig;

constexpr int kRoundBlocks = Config::kRoundBlocks;
constexpr int kRowTiles = Config::kRows / 8;
constexpr int kWarpTiles = Config::kWarpBits / 16;
constexpr int kStages = Config::kStages;
/// What products with the bits are to be multiplied by: 2^21.
constexpr float kSumScale = 2097152.0f;
/// What the weight of token s of a block takes.
__device__ __forceinline__ float weight_factor(int s) {
  return static_cast<float>(1 << (3 - s % 4));
}

/// Adds `other` to `total`.
__device__ __forceinline__ void merge(RowSum& total, RowSum other) {
  const float largest = fmaxf(total.max, other.max);
  if (largest == -INFINITY) return;
  total.sum =
      total.sum * exp2_approx(total.max - largest) + other.sum * exp2_approx(other.max - largest);
  total.max = largest;
}

/// Threads that share the blocks of a row.
constexpr int kRowThreads = Config::kThreads / Config::kRows;
using MergeScratch = RowSum[kRowThreads][Config::kRows + 1];

/// Largest score of row `threadIdx.x / kRowThreads` over the blocks `[first, first + count)` and
/// what they sum to, the same for all its threads. `scratch` is shared.
__device__ __forceinline__ RowSum merge_blocks(const Problem& p, Index first, int count,
                                               int first_row, int rows, MergeScratch& scratch) {
  // First thread t takes row t % kRows, every kRowThreads-th block from t / kRows on, some at once.
  constexpr int kAtOnce = 8;
  const int row = threadIdx.x % Config::kRows, begin = threadIdx.x / Config::kRows;
  RowSum total = {-INFINITY, 0};
  if (row < rows) {
    const RowSum* const sums = p.block_sums + first * p.row_stride + first_row + row;
#pragma unroll 1
    for (int i = begin; i < count; i += kRowThreads * kAtOnce) {
      RowSum some[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        some[j] = i + j * kRowThreads < count ? sums[Index{i + j * kRowThreads} * p.row_stride]
                                              : RowSum{-INFINITY, 0};
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) merge(total, some[j]);
    }
  }
  scratch[begin][row] = total;
  __syncthreads();
  total = scratch[threadIdx.x % kRowThreads][threadIdx.x / kRowThreads];
#pragma unroll
  for (int step = 1; step < kRowThreads; step *= 2)
    merge(total, {__shfl_xor_sync(~0u, total.max, step), __shfl_xor_sync(~0u, total.sum, step)});
  return total;
}

/// A round's blocks as they are copied: every warp copies its own bits, every thread the weights
/// that it scales.
struct Stage {
  static constexpr int kWarps = Config::kThreads / 32;
  /// [half of the block]: 16-bit words.
  std::uint32_t bits[kWarps][kRoundBlocks][2][Config::kWarpBits / 2];
  uint4 weights[Config::kThreads];  ///< four pairs of fp16
  float maxima[Config::kThreads];   ///< of the weights' rows in their blocks
};

/// Weights of a round relative to the maxima, as an operand: matrices of eight rows of weights x
/// eight tokens, a row's sixteen bytes after the other. Word q of step i, half h is the weight of
/// tokens s and s + 16, s = 4 q + 2 i + h.
using Weights = std::uint32_t[kRoundBlocks][2][2][kRowTiles][32];

struct Shared {
  alignas(128) Weights weights[2];
  alignas(128) Stage stages[kStages];
  MergeScratch scratch;
  float maxima[Config::kRows];
  Cursor cursor;
};
constexpr int kSharedBytes = sizeof(Shared);

/// The block of a round, and the row, whose weights this thread copies and scales: a warp takes
/// eight rows of a block, a lane four pairs, 4 q and on.
__device__ __forceinline__ int weights_block() {
  return static_cast<int>(threadIdx.x) / (4 * Config::kRows);
}
__device__ __forceinline__ int weights_row() {
  return static_cast<int>(threadIdx.x) / 4 % Config::kRows;
}

/// What a thread copies of each round.
class RoundCopy {
 public:
  __device__ __forceinline__ RoundCopy(const Problem& p, const Cursor& cursor, int count,
                                       int first_bit, int first_row)
      : page_stride_(p.page_stride),
        bits_left_(count),
        weights_left_(count),
        last_token_(p.seq_lens[cursor.seq] - 1),
        table_(p.block_table + Index{cursor.seq} * p.max_blocks),
        shift_(p.page.shift) {
    const Index row = Index{cursor.index + weights_block()} * p.row_stride + first_row;
    // Rows beyond the last one are not there; any will do.
    const int in_rows = min(weights_row(), p.row_stride - first_row - 1);
    weights_ = p.weights + (row + in_rows) * 16 + threadIdx.x % 4 * 4;
    sums_ = p.block_sums + row + in_rows;
    row_stride_ = p.row_stride;
    const int bit = first_bit + Config::kWarpBits * (static_cast<int>(threadIdx.x) / 32) +
                    8 * (lane() % kHalfVectors);
    token_ = (cursor.block + bits_block()) * kBlockTokens + 16 * (lane() / kHalfVectors % 2);
    const int slot = token_ & (p.page.size - 1);
    bits_ = p.pages + p.page.value_codes + slot / 16 * 2 * p.page.num_code_bits +
            2 * (bit < p.page.num_code_bits ? bit : 0);
    find_page();
  }
  /// Starts copying the next round's bits.
  __device__ __forceinline__ void next_bits(Stage& stage) {
    if (lane() < kBitVectors && bits_block() < bits_left_)
      copy_async_16(shared_address(&stage.bits[threadIdx.x / 32][0][0][lane() * 4]),
                    bits_ + page_ * page_stride_);
    bits_left_ -= kRoundBlocks;
    token_ += kRoundTokens;
    find_page();
  }
  /// Starts copying the next round's weights, and closes a group of copies.
  __device__ __forceinline__ void next_weights(Stage& stage) {
    if (weights_block() < weights_left_) {
      copy_async_16(shared_address(&stage.weights[threadIdx.x]), weights_);
      copy_async_4(shared_address(&stage.maxima[threadIdx.x]), &sums_->max);
    }
    commit_copies();
    weights_left_ -= kRoundBlocks;
    weights_ += kRoundBlocks * 16 * row_stride_;
    sums_ += kRoundBlocks * row_stride_;
  }

 private:
  static constexpr int kRoundTokens = kRoundBlocks * kBlockTokens;
  static constexpr int kHalfVectors = Config::kWarpBits / 8;  ///< of sixteen tokens
  static constexpr int kBitVectors = kRoundBlocks * 2 * kHalfVectors;
  static_assert(kBitVectors <= 32);
  static_assert(kRoundBlocks * Config::kRows * 4 == Config::kThreads, "16 bytes of weights each");
  static_assert(kRoundTokens % 128 == 0, "a thread's slot is the same in all rounds");

  Index page_stride_;
  int bits_left_, weights_left_;  ///< blocks
  int last_token_;
  const std::int32_t* table_;
  int shift_;
  int token_;  ///< first one of the sixteen
  int page_;   ///< read a round ahead
  int row_stride_;
  const std::uint8_t* bits_;  ///< if they were in page 0
  const std::uint32_t* weights_;
  const RowSum* sums_;

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int bits_block() { return lane() / (2 * kHalfVectors); }
  /// The second half may lie beyond the last page; its weights are zero, so any bits will do.
  __device__ __forceinline__ void find_page() {
    page_ = table_[min(token_, last_token_) >> shift_];
  }
};

/// Brings this thread's weights of a round, of which `count` blocks are there, to the row's
/// maximum.
__device__ __forceinline__ void scale_weights(const Stage& stage, int count, float maximum,
                                              Weights& weights) {
  const uint4 raw = stage.weights[threadIdx.x];
  const __half2 factor = __float2half2_rn(exp2_approx(stage.maxima[threadIdx.x] - maximum));
  const std::uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
  const int tile = weights_row() / 8, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    weights[weights_block()][i / 2][i % 2][tile][lane] =
        weights_block() < count ? as_bits(__hmul2(as_half2(pairs[i]), factor)) : 0;
  show_to_async_units();
}

/// The sums of a warp's bits: lane 4g + q has bits 16 i + 2 g and the next of every tile i.
using Sums = float[kWarpTiles][kRowTiles][4];

/// Sixteen bits of a block as operands: of two steps, of eight pairs of tokens each.
using BitOperand = std::uint32_t[2][4];

__device__ __forceinline__ void load_bits(const Stage& stage, int block, int tile,
                                          BitOperand& operand) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, shift = threadIdx.x % 4 * 4;
  const std::uint32_t low = stage.bits[warp][block][0][8 * tile + g] >> shift;
  const std::uint32_t high = stage.bits[warp][block][1][8 * tile + g] >> shift;
  const std::uint32_t first = __byte_perm(low, high, 0x5410);
  const std::uint32_t second = __byte_perm(low, high, 0x7632);
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const std::uint32_t mask = 0x00010001u << (2 * step);
    operand[step][0] = first & mask, operand[step][1] = second & mask;
    operand[step][2] = first & mask << 1, operand[step][3] = second & mask << 1;
  }
}

/// Adds the products of a round's bits with its weights.
__device__ __forceinline__ void multiply(const Stage& stage, const Weights& weights, Sums& sums) {
  constexpr int kStepBytes = sizeof(weights[0][0]), kHalfBytes = kStepBytes / 2;
#if COMMVQ_WGMMA
  const WgmmaOperand operand(shared_address(&weights), kHalfBytes, 128);
  constexpr int kAtOnce = kRoundBlocks / kWarpTiles;  // blocks: operands of more take registers
#pragma unroll
  for (int first = 0; first < kRoundBlocks; first += kAtOnce) {
    BitOperand bits[kAtOnce][kWarpTiles];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
      for (int tile = 0; tile < kWarpTiles; ++tile)
        load_bits(stage, first + i, tile, bits[i][tile]);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int tile = 0; tile < kWarpTiles; ++tile)
          wgmma(sums[tile], bits[i][tile][step], operand.at((2 * (first + i) + step) * kStepBytes),
                true);
    wgmma_commit();
#pragma unroll
    for (auto& of_tile : sums) wgmma_wait<0>(of_tile);
  }
#else
  // Lane 8 i + j reads row j of matrix i.
  const int lane = threadIdx.x % 32;
  const std::uint32_t place = shared_address(&weights[0][0][0][lane / 8][lane % 8 * 4]);
#pragma unroll
  for (int block = 0; block < kRoundBlocks; ++block) {
    BitOperand bits[kWarpTiles];
#pragma unroll
    for (int tile = 0; tile < kWarpTiles; ++tile) load_bits(stage, block, tile, bits[tile]);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const std::uint32_t at = place + (2 * block + step) * kStepBytes;
      const uint4 first = load_matrices(at), second = load_matrices(at + kHalfBytes);
#pragma unroll
      for (int tile = 0; tile < kWarpTiles; ++tile) {
        const std::uint32_t(&a)[4] = bits[tile][step];
        mma_16x8x16(sums[tile][0], a[0], a[1], a[2], a[3], first.x, second.x);
        mma_16x8x16(sums[tile][1], a[0], a[1], a[2], a[3], first.y, second.y);
        mma_16x8x16(sums[tile][2], a[0], a[1], a[2], a[3], first.z, second.z);
        mma_16x8x16(sums[tile][3], a[0], a[1], a[2], a[3], first.w, second.w);
      }
    }
  }
#endif
}

/// Writes a warp's sums.
__device__ __forceinline__ void store(const Problem& p, Index slot, int first_bit, int first_row,
                                      int rows, const Sums& sums) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int tile = 0; tile < kWarpTiles; ++tile) {
    const int bit = first_bit + Config::kWarpBits * warp + 16 * tile + 2 * g;
    if (bit >= p.page.num_code_bits) return;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = 8 * t + 2 * q + e;
        if (row >= rows) continue;
        float* const target =
            p.value_sums + (slot * p.row_stride + first_row + row) * p.num_sums + bit;
        *reinterpret_cast<float2*>(target) =
            make_float2(sums[tile][t][e] * kSumScale, sums[tile][t][2 + e] * kSumScale);
      }
  }
}

/// Adds up a sequence's blocks in one part, whose first rounds are being copied.
__device__ __forceinline__ void add_rounds(Shared& shared, RoundCopy& copy, int count,
                                           float maximum, Sums& sums) {
  wait_for_copies_but<kStages - 2>();
  scale_weights(shared.stages[0], count, maximum, shared.weights[0]);
  int left = count;
#pragma unroll 1
  while (left > 0) {
    // Where a round's data lie are constants.
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      if (left <= 0) break;
      left -= kRoundBlocks;
      wait_for_copies_but<kStages - 3>();
      __syncthreads();  // the round's weights are there, and nobody reads the last one's any more
      Stage& free = shared.stages[(i + kStages - 1) % kStages];
      copy.next_bits(free);
      copy.next_weights(free);
      scale_weights(shared.stages[(i + 1) % kStages], left, maximum, shared.weights[(i + 1) % 2]);
      multiply(shared.stages[i], shared.weights[i % 2], sums);
    }
  }
  wait_for_copies();
  __syncthreads();
}

/// `memory` is shared: `kSharedBytes`. What the call was given is read before the previous kernel
/// has ended, which has waited for it.
__device__ inline void run(const Problem& p, std::uint8_t* memory) {
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int first_bit = blockIdx.y * Config::kChunkBits;
  const int first_row = blockIdx.z * Config::kRows;
  const int rows = min(Config::kRows, p.num_rows - first_row);
  if (threadIdx.x < 32) {
    const int total = total_blocks(p);
    const Cursor begin = part_cursor(p, total, static_cast<int>(blockIdx.x), value_parts(p, total));
    if (threadIdx.x == 0) shared.cursor = begin;
  }
  __syncthreads();
  Cursor cursor = shared.cursor;
#pragma unroll 1
  while (!cursor.done()) {
    const int count = cursor.count(INT_MAX);
    const Index slot = Index{blockIdx.x} + cursor.seq;
    RoundCopy copy(p, cursor, count, first_bit, first_row);
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) copy.next_bits(shared.stages[stage]);
    start_after_previous_kernel();  // which scores the keys
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) copy.next_weights(shared.stages[stage]);
    const RowSum merged = merge_blocks(p, cursor.index, count, first_row, rows, shared.scratch);
    const int row = threadIdx.x / kRowThreads;
    if (threadIdx.x % kRowThreads == 0) {
      shared.maxima[row] = merged.max == -INFINITY ? 0.0f : merged.max;
      if (blockIdx.y == 0 && row < rows)
        p.part_sums[slot * p.row_stride + first_row + row] = merged;
    }
    __syncthreads();
    Sums sums = {};
    add_rounds(shared, copy, count, shared.maxima[weights_row()], sums);
    store(p, slot, first_bit, first_row, rows, sums);
    cursor.advance(p, count);
  }
  start_after_previous_kernel();  // where there is nothing to add up
}

}  // namespace commvq::cuda::value_sums
