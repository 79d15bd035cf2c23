#pragma once

#include "common/launch.cuh"
#include "common/memory.cuh"
#include "decode_attention/config.hpp"
#include "decode_attention/problem.cuh"

/// Merges what the parts of binary codes gathered for some rows of one sequence and KV head,
/// applies the head's value decoder and adds the exact tokens: one thread block, in as few
/// instructions as can be, since nothing else runs meanwhile.
namespace commvq::cuda::binary_combine {

using Config = BinaryAttentionConfig;

constexpr int kRows = Config::kRows;
constexpr int kThreads = Config::kCombineThreads;
constexpr int kDim = 2 * BinaryKeys::kPairs;
/// Threads of a channel: among these its row of the decoder is shared out, and then the rows.
constexpr int kShares = kThreads / kDim;
static_assert(kShares == kRows);

template <int kSums>
struct Shared {
  float4 sums[kSums];  ///< of all rows
  RowSum coded[kRows];
  float shares[kShares][kRows][kDim];
};

/// Numbers that count in powers of two, relative to the largest of these.
__device__ __forceinline__ float relative(float number, float largest) {
  return exp2_approx(number - fmaxf(largest, -1e30f));
}

/// One sum of a row over all parts, and the row's total.
struct Merged {
  RowSum total{-INFINITY, 0};
  float value = 0;

  __device__ __forceinline__ Merged(const Problem& p, PartRange parts, int seq, int row, int sum) {
    constexpr int kAtOnce = Config::kPartsAtOnce;
#pragma unroll 1
    for (int first = 0; first < parts.count(); first += kAtOnce) {
      const Index slot = (Index{parts.first} + first + seq) * p.row_stride + row;
      const RowSum* const totals = p.part_sums + slot;
      const float* const values = p.value_sums + slot * p.num_sums + sum;
      const Index stride = Index{p.row_stride} * p.num_sums;
      RowSum some_totals[kAtOnce];
      float some[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const bool is_part = first + i < parts.count();
        some_totals[i] = is_part ? totals[Index{i} * p.row_stride] : RowSum{-INFINITY, 0};
        some[i] = is_part ? values[i * stride] : 0;
      }
      float largest = total.max;
#pragma unroll
      for (const RowSum& part : some_totals) largest = fmaxf(largest, part.max);
      const float keep = relative(total.max, largest);
      total = {largest, total.sum * keep};
      value *= keep;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float factor = relative(some_totals[i].max, largest);
        total.sum += some_totals[i].sum * factor;
        value += some[i] * factor;
      }
    }
  }
};

/// What the exact tokens give a channel of a row.
struct Exact {
  static constexpr int kPieces = ExactWarpsConfig::kMaxPieces;
  RowSum totals[kPieces];
  float outputs[kPieces];

  __device__ __forceinline__ Exact(const Problem& p, Index row, int channel) {
    const RowSum* const from = p.exact_sums + row * p.num_exact_pieces;
    const float* const of_channel = p.exact_outputs + row * p.num_exact_pieces * kDim + channel;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      totals[i] = i < p.num_exact_pieces ? from[i] : RowSum{-INFINITY, 0};
      outputs[i] = i < p.num_exact_pieces ? of_channel[i * kDim] : 0;
    }
  }

  /// Adds them to what the coded tokens give.
  __device__ __forceinline__ void add_to(RowSum& total, float& output) const {
    const float before = total.max;
#pragma unroll
    for (const RowSum& piece : totals) total.max = fmaxf(total.max, piece.max);
    const float keep = relative(before, total.max);
    total.sum *= keep;
    output *= keep;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const float factor = relative(totals[i].max, total.max);
      total.sum += totals[i].sum * factor;
      output += outputs[i] * factor;
    }
  }
};

/// A thread's share of the decoder: some of its channel's entries, read some at once.
template <int kSums>
struct DecoderShare {
  static constexpr int kAtOnce = 16;
  const float* column;  ///< of the thread's first sum
  float entries[kAtOnce];

  __device__ __forceinline__ void load(int first) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) entries[i] = column[(first + i * kShares) * kDim];
  }
  /// Its entries times the sums, of all rows. The first ones have been read.
  __device__ __forceinline__ float4 decoded(const float4 (&sums)[kSums], int share) {
    float4 outputs{};
#pragma unroll 1
    for (int first = 0; first < kSums; first += kShares * kAtOnce) {
      if (first > 0) load(first);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float4 four = sums[first + i * kShares + share];
        outputs.x += four.x * entries[i];
        outputs.y += four.y * entries[i];
        outputs.z += four.z * entries[i];
        outputs.w += four.w * entries[i];
      }
    }
    return outputs;
  }
};

__device__ __forceinline__ void store(const Problem& p, bool valid, int seq, int head, int row,
                                      int channel, RowSum total, float output) {
  const Index target =
      (Index{seq} * p.num_query_tokens + row / p.group) * (p.num_kv_heads * p.group) +
      head * p.group + row % p.group;
  store_float(p.output, p.type, target * kDim + channel,
              valid ? __fdividef(output, total.sum) : NAN);
  if (channel == 0 && p.lse != nullptr)
    p.lse[target] = valid ? (total.max + log2f(total.sum)) * 0.693147180559945f : NAN;
}

template <int kSums>
__device__ __forceinline__ void run(const Problem& p, const float* decoder) {
  __shared__ Shared<kSums> shared;
  const int first_row = static_cast<int>(blockIdx.x) * kRows;
  const int head = static_cast<int>(blockIdx.y), seq = static_cast<int>(blockIdx.z);
  const int rows = min(kRows, p.rows_per_head - first_row);
  const int channel = static_cast<int>(threadIdx.x) % kDim, share = threadIdx.x / kDim;
  DecoderShare<kSums> decoder_share{decoder + (Index{head} * kSums + share) * kDim + channel, {}};
  decoder_share.load(0);  // while the previous kernel ends
  wait_for_previous_kernel();
  const int row = first_row + min(share, rows - 1);
  const Exact exact(p, Index{seq} * p.num_rows + head * p.rows_per_head + row, channel);
  const int total = total_blocks(p);
  const bool valid = fits(p, total) && p.seq_lens[seq] >= p.num_query_tokens;
  const PartRange parts = valid ? parts_of(p, total, seq) : PartRange{};
#pragma unroll 1
  for (int item = threadIdx.x; item < kRows * kSums; item += kThreads) {
    const int of_row = min(item / kSums, rows - 1), sum = item % kSums;
    const Merged merged(p, parts, seq, head * p.rows_per_head + first_row + of_row,
                        head * kSums + sum);
    (&shared.sums[sum].x)[item / kSums] = merged.value;
    if (sum == 0) shared.coded[item / kSums] = merged.total;
  }
  __syncthreads();
  const float4 outputs = decoder_share.decoded(shared.sums, share);
  shared.shares[share][0][channel] = outputs.x;
  shared.shares[share][1][channel] = outputs.y;
  shared.shares[share][2][channel] = outputs.z;
  shared.shares[share][3][channel] = outputs.w;
  __syncthreads();
  if (share >= rows) return;
  float output = 0;
#pragma unroll
  for (int i = 0; i < kShares; ++i) output += shared.shares[i][share][channel];
  RowSum row_total = shared.coded[share];
  exact.add_to(row_total, output);
  store(p, valid, seq, head, row, channel, row_total, output);
}

}  // namespace commvq::cuda::binary_combine
