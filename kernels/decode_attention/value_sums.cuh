#pragma once

#include "common/barrier.cuh"
#include "common/memory.cuh"
#include "common/mma.cuh"
#include "decode_attention/config.hpp"
#include "decode_attention/problem.cuh"

/// Sums of value codes, sum over tokens of weight * b, for the rows of all heads at once: every
/// code bit matters to every head, so a bit that was expanded serves 32 rows.
///
/// A 32-bit word holds one code bit of tokens 0 to 15 (low half) and 16 to 31 (high half) of a
/// block. A mask leaves bit s of either half: as fp16 numbers these are bit * 2^(s - 24), operands
/// of a matrix product as they are. The weights take 2^(3 - s % 4) to make up for it: the word is
/// shifted by whole fours.
namespace commvq::cuda::value_sums {

using Config = ValueSumsConfig;

constexpr int kTiles = Config::kWarpBits / 16;  ///< of bits
constexpr int kLaneBits = Config::kWarpBits / 8;
constexpr int kRowTiles = Config::kRows / 8;
/// What a sum is to be multiplied by: 2^21.
constexpr float kSumScale = 2097152.0f;
/// What the weights of tokens s, s + 8, s + 16 and s + 24 of a block take.
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

/// Largest score of each row over the blocks `[first, first + count)` and what they sum to.
/// Leaves the maxima in `maxima`, shared, `[kRows]`.
__device__ inline RowSum merge_blocks(const Problem& p, Index first, int count, int first_row,
                                      int rows, RowSum* scratch, float* maxima) {
  // Thread t: row t % 32, every sixteenth block from t / 32 on, some of them at once.
  const int row = threadIdx.x % Config::kRows;
  constexpr int kLanes = Config::kThreads / Config::kRows;
  constexpr int kAtOnce = 6;
  RowSum total = {-INFINITY, 0};
  if (row < rows) {
    const RowSum* const sums = p.block_sums + first * p.row_stride + first_row + row;
    for (int i = threadIdx.x / Config::kRows; i < count; i += kLanes * kAtOnce) {
      RowSum some[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        some[j] = i + j * kLanes < count ? sums[Index{i + j * kLanes} * p.row_stride]
                                         : RowSum{-INFINITY, 0};
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) merge(total, some[j]);
    }
  }
  scratch[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x < Config::kRows) {
    for (int i = 1; i < kLanes; ++i) merge(total, scratch[i * Config::kRows + row]);
    maxima[row] = total.max == -INFINITY ? 0.0f : total.max;
  }
  __syncthreads();
  return total;
}

/// What the two warps of a token group multiply for one block, as it lies in shared memory.
struct Stage {
  uint4 bits[2][Config::kBitGroups][Config::kWarpBits / 8];  ///< [half of the block]: 16-bit words
  uint4 weights[Config::kRows][4];                           ///< sixteen pairs of fp16
  RowSum sums[Config::kRows];
};
constexpr int kStages = 6;

/// What a lane copies of each block that its token group takes: 16 bytes of its warp's bits, of the
/// group's weights, and of their sums.
class BlockCopy {
 public:
  __device__ __forceinline__ BlockCopy(const Problem& p, const Cursor& cursor, int group, int bit,
                                       int first_row)
      : table_(p.block_table + Index{cursor.seq} * p.max_blocks), length_(p.seq_lens[cursor.seq]) {
    const int lane = threadIdx.x % 32, bit_group = threadIdx.x / 32 % Config::kBitGroups;
    const int rows_left = p.row_stride - first_row;
    const Index block = Index{cursor.index} + group;
    const int vector = 32 * bit_group + lane;
    copies_weights_ = vector / 4 < rows_left;
    weights_ = p.weights + (block * p.row_stride + first_row + vector / 4) * 16 + vector % 4 * 4;
    copies_sums_ = bit_group == 0 && lane < Config::kRows / 2 && lane * 2 < rows_left;
    sums_ = p.block_sums + block * p.row_stride + first_row + lane * 2;
    copies_bits_ = lane < 2 * kVectors;
    token_ = (cursor.block + group) * kBlockTokens + 16 * (lane / kVectors);
    const int first_bit = bit + lane % kVectors * 8;
    bits_ = p.page.value_codes + 2 * (first_bit < p.page.num_code_bits ? first_bit : 0);
  }
  /// Starts copying the next block.
  __device__ __forceinline__ void next(const Problem& p, Stage& stage) {
    const int lane = threadIdx.x % 32, bit_group = threadIdx.x / 32 % Config::kBitGroups;
    if (copies_bits_) {
      // The second half may lie beyond the last page; its weights are zero, so any bits will do.
      const int token = token_ < length_ ? token_ : token_ - 16;
      const std::uint8_t* const page = p.pages + table_[token >> p.page.shift] * p.page_stride;
      const int slot = token & (p.page.size - 1);
      copy_async_16(shared_address(&stage.bits[lane / kVectors][bit_group][lane % kVectors]),
                    page + (bits_ + slot / 16 * 2 * p.page.num_code_bits));
    }
    const int vector = 32 * bit_group + lane;
    if (copies_weights_)
      copy_async_16(shared_address(&stage.weights[vector / 4][vector % 4]), weights_);
    if (copies_sums_) copy_async_16(shared_address(&stage.sums[lane * 2]), sums_);
    token_ += Config::kTokenGroups * kBlockTokens;
    weights_ += Config::kTokenGroups * 16 * p.row_stride;
    sums_ += Config::kTokenGroups * p.row_stride;
  }

 private:
  static constexpr int kVectors = Config::kWarpBits / 8;  ///< of bits of sixteen tokens
  static_assert(Config::kRows * 4 == 32 * Config::kBitGroups, "a lane copies 16 bytes of weights");

  const std::int32_t* table_;
  int length_;
  int token_;
  int bits_;
  bool copies_bits_, copies_weights_, copies_sums_;
  const std::uint32_t* weights_;
  const RowSum* sums_;
};

/// Weights of rows g, 8 + g, ... relative to `maxima`: lane 4g + q holds tokens 4q to 4q + 3 of
/// either half.
__device__ __forceinline__ void load_weights(const Stage& stage, const float (&maxima)[kRowTiles],
                                             std::uint32_t (&weights)[kRowTiles][4]) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
    const __half2 factor = __float2half2_rn(exp2_approx(stage.sums[8 * t + g].max - maxima[t]));
    const uint4 v = stage.weights[8 * t + g][q];
    const std::uint32_t raw[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[t][i] = as_bits(__hmul2(as_half2(raw[i]), factor));
  }
}

/// Lane 4g + q holds bits kLaneBits g and those after it of its warp.
__device__ __forceinline__ void multiply(const Stage& stage,
                                         const std::uint32_t (&weights)[kRowTiles][4],
                                         float (&sums)[kTiles][kRowTiles][4]) {
  const int g = threadIdx.x % 32 / 4, shift = threadIdx.x % 4 * 4;
  const int bit_group = threadIdx.x / 32 % Config::kBitGroups;
  // Bits 2 i (rows 0-7 of fragment i) and 2 i + 1 (rows 8-15) of the lane's.
  std::uint32_t first[kTiles], second[kTiles];
#pragma unroll
  for (int vector = 0; vector < kLaneBits / 8; ++vector) {
    const uint4 low = stage.bits[0][bit_group][kLaneBits / 8 * g + vector];
    const uint4 high = stage.bits[1][bit_group][kLaneBits / 8 * g + vector];
    const std::uint32_t lows[4] = {low.x, low.y, low.z, low.w};
    const std::uint32_t highs[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      first[4 * vector + i] = __byte_perm(lows[i] >> shift, highs[i] >> shift, 0x5410);
      second[4 * vector + i] = __byte_perm(lows[i] >> shift, highs[i] >> shift, 0x7632);
    }
  }
  // All sums take turns, so that no product waits for the one before it.
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const std::uint32_t mask = 0x00010001u << (2 * step);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t)
        mma_16x8x16(sums[tile][t], first[tile] & mask, second[tile] & mask, first[tile] & mask << 1,
                    second[tile] & mask << 1, weights[t][2 * step], weights[t][2 * step + 1]);
  }
}

/// Adds up the sums of the token groups and writes them. `scratch` holds two groups' sums,
/// `[2][kBitGroups][kTiles * kRowTiles * 4][32]` floats.
__device__ inline void store(const Problem& p, Index slot, int first_bit, int first_row, int rows,
                             float (&sums)[kTiles][kRowTiles][4], float* scratch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int bit_group = warp % Config::kBitGroups, token_group = warp / Config::kBitGroups;
  constexpr int kSums = kTiles * kRowTiles * 4;
  for (int groups = Config::kTokenGroups / 2; groups > 0; groups /= 2) {
    float* const mine =
        scratch + ((token_group % groups) * Config::kBitGroups + bit_group) * kSums * 32 + lane;
    if (token_group >= groups && token_group < 2 * groups) {
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        mine[i * 32] = sums[i / (4 * kRowTiles)][i / 4 % kRowTiles][i % 4];
    }
    __syncthreads();
    if (token_group < groups) {
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        sums[i / (4 * kRowTiles)][i / 4 % kRowTiles][i % 4] += mine[i * 32];
    }
    __syncthreads();
  }
  if (token_group != 0) return;
  const int g = lane / 4, q = lane % 4;
  const int bit = first_bit + bit_group * Config::kWarpBits + kLaneBits * g;
  if (bit >= p.page.num_code_bits) return;
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = 8 * t + 2 * q + e;
      if (row >= rows) continue;
      float* const target =
          p.value_sums + (slot * p.row_stride + first_row + row) * p.num_sums + bit;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        *reinterpret_cast<float2*>(target + 2 * tile) =
            make_float2(sums[tile][t][e], sums[tile][t][2 + e]);
    }
}

/// A sequence's blocks in one part: every token group takes each fourth of them.
__device__ __forceinline__ void add_segment(const Problem& p, const Cursor& cursor, int count,
                                            int first_bit, int first_row,
                                            const float (&maxima)[kRowTiles], Stage* stages,
                                            const Barrier& barrier, int& turns_done,
                                            float (&sums)[kTiles][kRowTiles][4]) {
  const int warp = threadIdx.x / 32;
  const int bit = first_bit + warp % Config::kBitGroups * Config::kWarpBits;
  const int group = warp / Config::kBitGroups;
  BlockCopy copy(p, cursor, group, bit, first_row);
  const int turns = (count - group + Config::kTokenGroups - 1) / Config::kTokenGroups;
#pragma unroll 1
  for (int turn = 0; turn < kStages - 1; ++turn) {
    if (turn < turns) copy.next(p, stages[turn]);
    commit_copies();
  }
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    wait_for_copies_but<kStages - 2>();
    barrier.arrive();
    barrier.wait(turns_done++ % 2);
    if (turn + kStages - 1 < turns) copy.next(p, stages[(turn + kStages - 1) % kStages]);
    commit_copies();
    const Stage& stage = stages[turn % kStages];
    std::uint32_t weights[kRowTiles][4];
    load_weights(stage, maxima, weights);
    multiply(stage, weights, sums);
  }
  wait_for_copies();
}

/// `memory` is shared: `kSharedBytes`.
__device__ inline void run(const Problem& p, std::uint8_t* memory) {
  __shared__ RowSum merge_scratch[Config::kThreads];
  __shared__ float shared_maxima[Config::kRows];
  __shared__ std::uint64_t barriers[Config::kTokenGroups];  // of a token group's warps
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Stage* const stages = reinterpret_cast<Stage*>(memory) + warp / Config::kBitGroups * kStages;
  const int first_bit = blockIdx.y * Config::kChunkBits;
  const int first_row = blockIdx.z * Config::kRows;
  const int rows = min(Config::kRows, p.num_rows - first_row);
  const int total = total_blocks(p);
  Cursor cursor = part_cursor(p, total, static_cast<int>(blockIdx.x), value_parts(p, total));
  if (cursor.done()) return;
  const Barrier barrier(&barriers[warp / Config::kBitGroups]);
  if (threadIdx.x < Config::kTokenGroups)
    Barrier(&barriers[threadIdx.x]).init(32 * Config::kBitGroups);
  __syncthreads();
  int turns_done = 0;
#pragma unroll 1
  while (!cursor.done()) {
    const int count = cursor.count(INT_MAX);
    const Index slot = Index{blockIdx.x} + cursor.seq;
    const RowSum total_sum =
        merge_blocks(p, cursor.index, count, first_row, rows, merge_scratch, shared_maxima);
    if (blockIdx.y == 0 && threadIdx.x < rows)
      p.part_sums[slot * p.row_stride + first_row + threadIdx.x] = total_sum;
    float maxima[kRowTiles];
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) maxima[t] = shared_maxima[8 * t + lane / 4];
    float sums[kTiles][kRowTiles][4] = {};
    add_segment(p, cursor, count, first_bit, first_row, maxima, stages, barrier, turns_done, sums);
    __syncthreads();  // the stages' memory serves the sums now
    store(p, slot, first_bit, first_row, rows, sums, reinterpret_cast<float*>(memory));
    cursor.advance(p, count);
  }
}

/// The sums of two token groups take turns with the stages in shared memory.
constexpr int kScratchBytes = 2 * Config::kBitGroups * kTiles * kRowTiles * 4 * 32 * 4;
constexpr int kStageBytes = Config::kTokenGroups * kStages * static_cast<int>(sizeof(Stage));
constexpr int kSharedBytes = kScratchBytes > kStageBytes ? kScratchBytes : kStageBytes;

}  // namespace commvq::cuda::value_sums
