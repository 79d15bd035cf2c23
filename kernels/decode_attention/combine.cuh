#pragma once

#include "common/launch.cuh"
#include "common/memory.cuh"
#include "decode_attention/config.hpp"
#include "decode_attention/problem.cuh"
#include "decode_attention/value_sums.cuh"

/// Merges what the parts gathered over the tokens, applies the value decoder and adds the exact
/// tokens. A thread block takes some chunks of sums for some rows of one sequence and KV head;
/// the last one to finish adds up what the blocks of these rows found.
namespace commvq::cuda::combine {

using Config = CombineConfig;

/// Chunks of the sums.
__host__ __device__ inline int num_chunks(const Problem& p) {
  return (p.num_sums + Config::kChunk - 1) / Config::kChunk;
}

struct Shared {
  alignas(16) float sums[Config::kChunk][Config::kRows];
  float shares[Config::kRows][Config::kThreads];
  float exact_weights[Config::kRows][kMaxExactPieces];
  RowSum totals[Config::kRows];
  unsigned finished;
};

/// Factors that bring every part's sums to the row's maximum: `[kRows][parts]`, and the row's
/// total.
__device__ __forceinline__ void weigh_parts(const Problem& p, PartRange parts, int seq,
                                            int first_row, int rows, float* factors,
                                            Shared& shared) {
  const int lane = threadIdx.x % 32;
  const int num_parts = parts.count();
  for (int row = threadIdx.x / 32; row < rows; row += Config::kThreads / 32) {
    const RowSum* const exact =
        p.exact_sums + (Index{seq} * p.num_rows + first_row + row) * p.num_exact_pieces;
    const auto sum_of = [&](int i) {
      return p.part_sums[(Index{parts.first} + i + seq) * p.row_stride + first_row + row];
    };
    float largest = -INFINITY;
    for (int i = lane; i < p.num_exact_pieces; i += 32) largest = exact[i].max;
    for (int i = lane; i < num_parts; i += 32) largest = fmaxf(largest, sum_of(i).max);
    for (int step = 16; step > 0; step /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    float sum = 0;
    for (int i = lane; i < num_parts; i += 32) {
      const RowSum part = sum_of(i);
      const float factor = part.max == -INFINITY ? 0.0f : exp2f(part.max - largest);
      factors[row * num_parts + i] = factor;
      sum += part.sum * factor;
    }
    for (int i = lane; i < p.num_exact_pieces; i += 32) {
      const float factor = exact[i].max == -INFINITY ? 0.0f : exp2f(exact[i].max - largest);
      shared.exact_weights[row][i] = factor;
      sum += exact[i].sum * factor;
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) shared.totals[row] = {largest, sum};
  }
}

/// Sums of one bit or number of one row over all parts, some parts at once. The first are read
/// before their factors are known.
struct PartSums {
  static constexpr int kAtOnce = Config::kPartsAtOnce;
  float some[kAtOnce];

  __device__ __forceinline__ void load(const Problem& p, PartRange parts, int seq, int row, int bit,
                                       int first) {
    const float* const source =
        p.value_sums + ((Index{parts.first} + first + seq) * p.row_stride + row) * p.num_sums + bit;
    const Index stride = Index{p.row_stride} * p.num_sums;
    const int left = parts.count() - first;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) some[j] = j < left ? source[j * stride] : 0;
  }
  __device__ __forceinline__ float sum(const float* factors, int num_factors) const {
    float total = 0;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (j < num_factors) total += some[j] * factors[j];
    return total;
  }
};

/// A thread's share of the value decoder: channel threadIdx.x % dim of the head; the bits of the
/// chunk are shared out among the threads of a channel, and read some at a time.
struct DecoderColumn {
  static constexpr int kAtOnce = Config::kChunk / 4;
  const float* column;  ///< of the thread's first bit
  Index stride;         ///< to its next bit
  int row_size;         ///< channels of the decoder's rows
  int lanes;            ///< threads of a channel
  int lane;

  __device__ DecoderColumn(const Problem& p, const float* decoder, int head, int first_bit)
      : lanes(Config::kThreads / p.head_dim), lane(threadIdx.x / p.head_dim) {
    row_size = p.num_kv_heads * p.head_dim;
    column =
        decoder + Index{first_bit + lane} * row_size + head * p.head_dim + threadIdx.x % p.head_dim;
    stride = Index{lanes} * row_size;
  }
  __device__ void next_chunk() { column += Index{Config::kChunk} * row_size; }
  __device__ void load(int first, float (&entries)[kAtOnce]) const {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      entries[i] = lane + (first + i) * lanes < Config::kChunk ? column[(first + i) * stride] : 0;
  }
};

/// Adds a chunk's share of the output, its sums times its rows of the decoder, of which `entries`
/// are the first, to the thread's channel of all rows.
__device__ __forceinline__ void decode_chunk(const DecoderColumn& decoder,
                                             float (&entries)[DecoderColumn::kAtOnce],
                                             const Shared& shared,
                                             float (&outputs)[Config::kRows]) {
#pragma unroll 1
  for (int first = 0; decoder.lane + first * decoder.lanes < Config::kChunk;
       first += DecoderColumn::kAtOnce) {
    if (first > 0) decoder.load(first, entries);
#pragma unroll
    for (int i = 0; i < DecoderColumn::kAtOnce; ++i) {
      const int bit = min(decoder.lane + (first + i) * decoder.lanes, Config::kChunk - 1);
#pragma unroll
      for (int row = 0; row < Config::kRows; ++row)
        outputs[row] += shared.sums[bit][row] * entries[i];
    }
  }
}

/// What the threads of channel `d` have of a row.
__device__ __forceinline__ float output_of(const Problem& p, const Shared& shared, int row, int d) {
  float sum = 0;
#pragma unroll 4
  for (int i = d; i < Config::kThreads; i += p.head_dim) sum += shared.shares[row][i];
  return sum;
}

/// Adds up the blocks' outputs, or this only block's, and the exact tokens, divides, and writes the
/// rows.
__device__ __forceinline__ void finish(const Problem& p, bool valid, int seq, int head,
                                       int first_head_row, int rows, int num_blocks,
                                       const Shared& shared) {
  const int dim = p.head_dim;
  const int num_q_heads = p.num_kv_heads * p.group;
  for (int item = threadIdx.x; item < rows * dim; item += Config::kThreads) {
    const int row = item / dim, d = item % dim;
    const int head_row = first_head_row + row;
    const Index call_row = Index{seq} * p.num_rows + Index{head} * p.rows_per_head + head_row;
    float sum = num_blocks == 1 ? output_of(p, shared, row, d) : 0;
    if (num_blocks > 1)
#pragma unroll 8
      for (int block = 0; block < num_blocks; ++block)
        sum += __ldcg(p.block_outputs + (call_row * num_blocks + block) * dim + d);
#pragma unroll 4
    for (int piece = 0; piece < p.num_exact_pieces; ++piece)
      sum += shared.exact_weights[row][piece] *
             p.exact_outputs[(call_row * p.num_exact_pieces + piece) * dim + d];
    const Index target = (Index{seq} * p.num_query_tokens + head_row / p.group) * num_q_heads +
                         head * p.group + head_row % p.group;
    const RowSum total = shared.totals[row];
    store_float(p.output, p.type, target * dim + d, valid ? __fdividef(sum, total.sum) : NAN);
    if (d == 0 && p.lse != nullptr)
      p.lse[target] = valid ? (total.max + log2f(total.sum)) * 0.693147180559945f : NAN;
  }
}

/// The share of the chunks of this thread block in the output of its rows. `entries` are the first
/// of the first chunk, to which `decoder` points.
__device__ __forceinline__ void decode_chunks(const Problem& p, PartRange parts, int seq, int head,
                                              int first_row, int rows, DecoderColumn& decoder,
                                              float (&entries)[DecoderColumn::kAtOnce],
                                              float* factors, Shared& shared) {
  const int chunks = num_chunks(p), num_parts = parts.count();
  const int first_chunk = part_begin(chunks, blockIdx.x, gridDim.x);
  const int end_chunk = part_begin(chunks, blockIdx.x + 1, gridDim.x);
  const int bit = threadIdx.x % Config::kChunk, row = threadIdx.x / Config::kChunk;
  for (int i = threadIdx.x; i < Config::kRows * Config::kChunk; i += Config::kThreads)
    shared.sums[i / Config::kRows][i % Config::kRows] = 0;
  float outputs[Config::kRows] = {};
#pragma unroll 1
  for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
    const int chunk_bit = chunk * Config::kChunk + bit;
    PartSums some;
    if (row < rows) some.load(p, parts, seq, first_row + row, chunk_bit, 0);
    if (chunk == first_chunk) {
      weigh_parts(p, parts, seq, first_row, rows, factors, shared);
    } else {
      decoder.next_chunk();
      decoder.load(0, entries);
    }
    __syncthreads();
    if (row < rows) {
      const float* const row_factors = factors + row * num_parts;
      float sum = some.sum(row_factors, num_parts);
#pragma unroll 1
      for (int i = some.kAtOnce; i < num_parts; i += some.kAtOnce) {
        some.load(p, parts, seq, first_row + row, chunk_bit, i);
        sum += some.sum(row_factors + i, num_parts - i);
      }
      shared.sums[bit][row] = sum * value_sums::kSumScale;
    }
    __syncthreads();
    decode_chunk(decoder, entries, shared, outputs);
  }
#pragma unroll
  for (int i = 0; i < Config::kRows; ++i) shared.shares[i][threadIdx.x] = outputs[i];
}

/// Writes this block's outputs for the one that finishes, and counts it. True for the last one.
__device__ __forceinline__ bool hand_over(const Problem& p, int seq, int head, int first_row,
                                          int rows, Shared& shared) {
  const int dim = p.head_dim;
  for (int item = threadIdx.x; item < rows * dim; item += Config::kThreads)
    p.block_outputs[((Index{seq} * p.num_rows + first_row + item / dim) * gridDim.x + blockIdx.x) *
                        dim +
                    item % dim] = output_of(p, shared, item / dim, item % dim);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared.finished = atomicAdd(p.counters + blockIdx.z * gridDim.y + head, 1);
  __syncthreads();
  if (shared.finished + 1 != gridDim.x) return false;
  __threadfence();
  return true;
}

__device__ __forceinline__ void run(const Problem& p, const float* decoder, float* factors) {
  constexpr int kRows = Config::kRows;
  __shared__ Shared shared;
  const int head = blockIdx.y;
  const int row_blocks = (p.rows_per_head + kRows - 1) / kRows;
  const int seq = blockIdx.z / row_blocks;
  const int first_head_row = blockIdx.z % row_blocks * kRows;
  const int rows = min(kRows, p.rows_per_head - first_head_row);
  const int first_row = head * p.rows_per_head + first_head_row;
  const int num_blocks = static_cast<int>(gridDim.x);
  DecoderColumn column(p, decoder, head,
                       part_begin(num_chunks(p), blockIdx.x, num_blocks) * Config::kChunk);
  float entries[DecoderColumn::kAtOnce];
  column.load(0, entries);  // while the previous kernel ends
  wait_for_previous_kernel();
  const int total = total_blocks(p);
  const bool valid = fits(p, total) && p.seq_lens[seq] >= p.num_query_tokens;

  if (valid)
    decode_chunks(p, parts_of(p, total, seq), seq, head, first_row, rows, column, entries, factors,
                  shared);
  __syncthreads();
  if (num_blocks > 1 && !hand_over(p, seq, head, first_row, rows, shared)) return;
  finish(p, valid, seq, head, first_head_row, rows, num_blocks, shared);
}

}  // namespace commvq::cuda::combine
