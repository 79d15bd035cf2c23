#pragma once

#include "common/memory.cuh"
#include "common/mma.cuh"
#include "decode_attention/config.hpp"
#include "decode_attention/problem.cuh"

/// Sums of value codes, sum over tokens of weight * b, for the rows of all heads at once: every code
/// bit matters to every head, so a bit that was expanded serves 32 rows.
///
/// A 32-bit word holds one code bit of tokens 0 to 15 (low half) and 16 to 31 (high half) of a
/// block. A mask leaves bit s of either half: as fp16 numbers these are bit * 2^(s - 24), operands of
/// a matrix product as they are. The weights take 2^(3 - s) to make up for it.
namespace commvq::cuda::value_sums {

using Config = ValueSumsConfig;

constexpr int kTiles = Config::kWarpBits / 16;  ///< of bits
constexpr int kRowTiles = Config::kRows / 8;
/// What a sum is to be multiplied by: 2^21.
constexpr float kSumScale = 2097152.0f;

/// Adds `other` to `total`.
__device__ __forceinline__ void merge(RowSum& total, RowSum other) {
  const float largest = fmaxf(total.max, other.max);
  if (largest == -INFINITY) return;
  total.sum = total.sum * exp2_approx(total.max - largest) +
              other.sum * exp2_approx(other.max - largest);
  total.max = largest;
}

/// Largest score of each row over the blocks `[first, first + count)` and what they sum to.
/// Leaves the maxima in `maxima`, shared, `[kRows]`.
__device__ inline RowSum merge_blocks(const Problem& p, Index first, int count, int first_row,
                                      int rows, RowSum* scratch, float* maxima) {
  // Thread t: row t % 32, every eighth half block from t / 32 on, some of them at once.
  const int row = threadIdx.x % Config::kRows;
  constexpr int kLanes = Config::kThreads / Config::kRows;
  constexpr int kAtOnce = 8;
  RowSum total = {-INFINITY, 0};
  if (row < rows) {
    const RowSum* const sums = p.block_sums + first * kHalves * p.row_stride + first_row + row;
    for (int i = threadIdx.x / Config::kRows; i < count * kHalves; i += kLanes * kAtOnce) {
      RowSum some[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        some[j] = i + j * kLanes < count * kHalves ? sums[Index{i + j * kLanes} * p.row_stride]
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

/// What a lane multiplies for one block: lane 4g + q holds bits 16 g to 16 g + 15 of its warp and
/// tokens 4 q to 4 q + 3 of either half, and the weights of rows g, 8 + g, ...
struct Operands {
  uint4 bits[2][2];  ///< of tokens 0-15 and 16-31: sixteen 16-bit words
  uint4 weights[kRowTiles];
  float maxima[kRowTiles];
};

/// Pages of a block's two halves of sixteen tokens.
struct Pages {
  const std::uint8_t* data[2];
};

__device__ __forceinline__ Pages pages_of(const Problem& p, int seq, int block) {
  const std::int32_t* const table = p.block_table + Index{seq} * p.max_blocks;
  const int token = block * kBlockTokens;
  const int first = table[token >> p.page_shift];
  int second = first;
  // The second half may lie beyond the last page; its weights are zero, so any bits will do.
  if (p.layout.page_size < kBlockTokens && token + 16 < p.seq_lens[seq])
    second = table[(token + 16) >> p.page_shift];
  return {{p.pages + first * p.page_stride, p.pages + second * p.page_stride}};
}

__device__ __forceinline__ void load(const Problem& p, const Pages& pages, int block, Index index,
                                     int bit, int first_row, Operands& operands) {
  const int lane = threadIdx.x % 32;
  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
    const int row = min(first_row + 8 * t + g, p.row_stride - 1);
    operands.weights[t] = *reinterpret_cast<const uint4*>(
        p.weights + (index * p.row_stride + row) * 16 + 4 * q);
    operands.maxima[t] = p.block_sums[(index * kHalves + q / 2) * p.row_stride + row].max;
  }
  const int token = block * kBlockTokens;
  const bool inside = bit + 16 * g < p.layout.num_code_bits;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int slot = (token + 16 * half) & (p.layout.page_size - 1);
    const auto* const words = reinterpret_cast<const uint4*>(
        pages.data[half] + p.layout.value_codes(slot) + 2 * (inside ? bit + 16 * g : 0));
    operands.bits[half][0] = words[0];
    operands.bits[half][1] = words[1];
  }
}

/// Row tile t's weights relative to `maxima`, with the bits' powers of two.
__device__ __forceinline__ void scale_weights(const Operands& operands,
                                              const float (&maxima)[kRowTiles],
                                              std::uint32_t (&weights)[kRowTiles][4]) {
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
    const float factor = exp2_approx(operands.maxima[t] - maxima[t]);
    const std::uint32_t raw[4] = {operands.weights[t].x, operands.weights[t].y,
                                  operands.weights[t].z, operands.weights[t].w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      weights[t][i] =
          as_bits(__hmul2(as_half2(raw[i]), __float2half2_rn(factor * static_cast<float>(8 >> i))));
  }
}

__device__ __forceinline__ void multiply(const Operands& operands,
                                         const std::uint32_t (&weights)[kRowTiles][4],
                                         float (&sums)[kTiles][kRowTiles][4]) {
  const int shift = threadIdx.x % 4 * 4;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    // Bits 2 tile (rows 0-7 of the fragment) and 2 tile + 1 (rows 8-15) of the lane's sixteen.
    const auto word = [&](int half) {
      const uint4& v = operands.bits[half][tile / 4];
      const int i = tile % 4;
      return (i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w) >> shift;
    };
    const std::uint32_t low = word(0), high = word(1);
    const std::uint32_t first = __byte_perm(low, high, 0x5410);
    const std::uint32_t second = __byte_perm(low, high, 0x7632);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const std::uint32_t mask = 0x00010001u << (2 * step);
      const std::uint32_t a0 = first & mask, a1 = second & mask;
      const std::uint32_t a2 = first & mask << 1, a3 = second & mask << 1;
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t)
        mma_16x8x16(sums[tile][t], a0, a1, a2, a3, weights[t][2 * step], weights[t][2 * step + 1]);
    }
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
      for (int i = 0; i < kSums; ++i) mine[i * 32] = sums[i / (4 * kRowTiles)][i / 4 % kRowTiles][i % 4];
    }
    __syncthreads();
    if (token_group < groups) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i / (4 * kRowTiles)][i / 4 % kRowTiles][i % 4] += mine[i * 32];
    }
    __syncthreads();
  }
  if (token_group != 0) return;
  const int g = lane / 4, q = lane % 4;
  const int bit = first_bit + bit_group * Config::kWarpBits + 16 * g;
  if (bit >= p.layout.num_code_bits) return;
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = 8 * t + 2 * q + e;
      if (row >= rows) continue;
      float* const target = p.value_sums +
                            (slot * p.row_stride + first_row + row) * p.layout.num_code_bits + bit;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        *reinterpret_cast<float2*>(target + 2 * tile) =
            make_float2(sums[tile][t][e], sums[tile][t][2 + e]);
    }
}

__device__ inline void run(const Problem& p, float* scratch) {
  __shared__ RowSum merge_scratch[Config::kThreads];
  __shared__ float shared_maxima[Config::kRows];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int bit_group = warp % Config::kBitGroups, token_group = warp / Config::kBitGroups;
  const int first_bit = blockIdx.y * Config::kChunkBits;
  const int first_row = blockIdx.z * Config::kRows;
  const int rows = min(Config::kRows, p.num_rows - first_row);
  const int total = total_blocks(p);
  const int parts = value_parts(p, total);
  if (!fits(p, total) || blockIdx.x >= parts) return;
  Cursor cursor = cursor_at(p, part_begin(total, blockIdx.x, parts),
                            part_begin(total, blockIdx.x + 1, parts));
  while (!cursor.done()) {
    const int count = cursor.count(1 << 30);
    const Index slot = Index{blockIdx.x} + cursor.seq;
    const RowSum total_sum = merge_blocks(p, cursor.index, count, first_row, rows, merge_scratch,
                                          shared_maxima);
    if (blockIdx.y == 0 && threadIdx.x < rows)
      p.part_sums[slot * p.row_stride + first_row + threadIdx.x] = total_sum;
    float maxima[kRowTiles];
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) maxima[t] = shared_maxima[8 * t + lane / 4];

    float sums[kTiles][kRowTiles][4] = {};
    const int bit = first_bit + bit_group * Config::kWarpBits;
    // Operands are read one block ahead of their use, and pages two.
    Operands next;
    Pages pages;
    const auto block_of = [&](int i) { return cursor.block + min(i, count - 1); };
    if (token_group < count) {
      load(p, pages_of(p, cursor.seq, block_of(token_group)), block_of(token_group),
           cursor.index + token_group, bit, first_row, next);
      pages = pages_of(p, cursor.seq, block_of(token_group + Config::kTokenGroups));
    }
    for (int i = token_group; i < count; i += Config::kTokenGroups) {
      const Operands operands = next;
      const int ahead = i + Config::kTokenGroups;
      if (ahead < count) {
        load(p, pages, cursor.block + ahead, cursor.index + ahead, bit, first_row, next);
        pages = pages_of(p, cursor.seq, block_of(ahead + Config::kTokenGroups));
      }
      std::uint32_t weights[kRowTiles][4];
      scale_weights(operands, maxima, weights);
      multiply(operands, weights, sums);
    }
    store(p, slot, first_bit, first_row, rows, sums, scratch);
    cursor.advance(p, count);
  }
}

}  // namespace commvq::cuda::value_sums
