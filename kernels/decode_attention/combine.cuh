#pragma once

#include "common/launch.cuh"
#include "common/memory.cuh"
#include "decode_attention/config.hpp"
#include "decode_attention/problem.cuh"

/// Merges what the parts gathered over the tokens, applies the value decoder and adds the exact
/// tokens. A thread block takes some rows of one sequence and KV head and some chunks of sums,
/// every four lanes four sums of a row at a time, for which each weighs a quarter of the parts:
/// what they wait for is few reads that depend on each other, and little else runs meanwhile. Where
/// thread blocks share the chunks, the last one to finish adds up what they found.
namespace commvq::cuda::combine {

constexpr int kRows = CombineConfig::kRows;
static_assert(kRows == 4, "a float4 holds a sum of all rows");
/// Lanes that share the parts of four sums, of which each writes one.
constexpr int kMergingLanes = 4;

/// For sums that all heads share, of heads of kDim_ channels.
template <int kDim_>
struct SharedSums {
  static constexpr int kDim = kDim_;
  static constexpr int kThreads = 2 * kDim;
  static constexpr int kSums = CombineConfig::kChunk;  ///< at once
  static constexpr bool kPerHead = false;              ///< there may be more chunks
  static constexpr int kPartsAtOnce = CombineConfig::kPartsAtOnce;
};
/// For kSums_ sums of every head of 128 channels.
template <int kSums_>
struct HeadSums {
  static constexpr int kDim = 128;
  static constexpr int kThreads = 512;
  static constexpr int kSums = kSums_;
  static constexpr bool kPerHead = true;
  static constexpr int kPartsAtOnce = CombineConfig::kPartsAtOnceOfHeads;
};

/// Threads of a channel, among which a chunk's part of its column of the decoder is shared out.
template <class Shape>
constexpr int kShares = Shape::kThreads / Shape::kDim;
/// Outputs, of a row and channel each, that a thread finishes.
template <class Shape>
constexpr int kOutputs = kRows / kShares<Shape>;

template <class Shape>
struct Shared {
  float4 sums[Shape::kSums];  ///< of all rows
  RowSum coded[kRows];
  float shares[kShares<Shape>][kRows][Shape::kDim];
  unsigned finished;
};

/// Thread blocks among which the rows of a KV head are shared out.
__host__ __device__ inline int row_blocks(const Problem& p) {
  return (p.rows_per_head + kRows - 1) / kRows;
}
/// Chunks of the sums that all heads share.
__host__ __device__ inline int num_chunks(const Problem& p) {
  return (p.num_sums + CombineConfig::kChunk - 1) / CombineConfig::kChunk;
}

/// What a thread block takes.
struct Place {
  int seq;
  int head;
  int first_row;  ///< of the head's
  int rows;
  int row_block;  ///< of the call
  int block;      ///< among those that share the chunks
  int first_call_row;

  __device__ __forceinline__ explicit Place(const Problem& p)
      : seq(static_cast<int>(blockIdx.z)),
        head(static_cast<int>(blockIdx.y)),
        first_row(static_cast<int>(blockIdx.x) / p.num_combine_blocks * kRows),
        rows(min(kRows, p.rows_per_head - first_row)),
        row_block((seq * p.num_kv_heads + head) * row_blocks(p) + first_row / kRows),
        block(static_cast<int>(blockIdx.x) % p.num_combine_blocks),
        first_call_row(head * p.rows_per_head + first_row) {}
};

/// Numbers that count in powers of two, relative to the largest of these.
__device__ __forceinline__ float relative(float number, float largest) {
  return exp2_approx(number - fmaxf(largest, -1e30f));
}

/// Four sums of a row of the call over every fourth part, and the row's total over these.
template <class Shape>
struct Merged {
  RowSum total{-INFINITY, 0};
  float4 sums{};

  /// `first_sum` is the first one's, `lane` the first part's in the range.
  __device__ __forceinline__ Merged(const Problem& p, PartRange parts, int seq, int row,
                                    int first_sum, int lane) {
    constexpr int kAtOnce = Shape::kPartsAtOnce;
    const Index stride = Index{kMergingLanes} * p.row_stride;  // of the rows of parts
#pragma unroll 1
    for (int first = lane; first < parts.count(); first += kMergingLanes * kAtOnce) {
      const Index slot = (Index{parts.first} + first + seq) * p.row_stride + row;
      RowSum totals[kAtOnce];
      float4 some[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const bool is_part = first + kMergingLanes * i < parts.count();
        const Index at = slot + i * stride;
        totals[i] = is_part ? p.part_sums[at] : RowSum{-INFINITY, 0};
        some[i] = is_part
                      ? *reinterpret_cast<const float4*>(p.value_sums + at * p.num_sums + first_sum)
                      : float4{};
      }
      float largest = total.max;
#pragma unroll
      for (const RowSum& part : totals) largest = fmaxf(largest, part.max);
      weigh(relative(total.max, largest));
      total.max = largest;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float factor = relative(totals[i].max, largest);
        total.sum += totals[i].sum * factor;
        sums.x += some[i].x * factor;
        sums.y += some[i].y * factor;
        sums.z += some[i].z * factor;
        sums.w += some[i].w * factor;
      }
    }
  }
  /// All parts: what the neighbouring lanes have, too.
  __device__ __forceinline__ void gather_lanes() {
    float largest = total.max;
#pragma unroll
    for (int step = 1; step < kMergingLanes; step *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    weigh(relative(total.max, largest));
    total.max = largest;
#pragma unroll
    for (int step = 1; step < kMergingLanes; step *= 2)
      for (float* number : {&total.sum, &sums.x, &sums.y, &sums.z, &sums.w})
        *number += __shfl_xor_sync(~0u, *number, step);
  }

 private:
  __device__ __forceinline__ void weigh(float factor) {
    for (float* number : {&total.sum, &sums.x, &sums.y, &sums.z, &sums.w}) *number *= factor;
  }
};

/// What the exact tokens give a channel of a row of the call.
template <class Shape>
struct Exact {
  RowSum totals[ExactConfig::kMaxPieces];
  float outputs[ExactConfig::kMaxPieces];

  __device__ __forceinline__ void load(const Problem& p, int seq, int row, int channel) {
    const Index first = (Index{seq} * p.num_rows + row) * p.num_exact_pieces;
    const RowSum* const from = p.exact_sums + first;
    const float* const of_channel = p.exact_outputs + first * Shape::kDim + channel;
#pragma unroll
    for (int i = 0; i < ExactConfig::kMaxPieces; ++i) {
      totals[i] = i < p.num_exact_pieces ? from[i] : RowSum{-INFINITY, 0};
      outputs[i] = i < p.num_exact_pieces ? of_channel[i * Shape::kDim] : 0;
    }
  }
  /// Makes the first piece all of them.
  __device__ __forceinline__ void merge() {
    float largest = -INFINITY;
#pragma unroll
    for (const RowSum& piece : totals) largest = fmaxf(largest, piece.max);
    RowSum total{largest, 0};
    float output = 0;
#pragma unroll
    for (int i = 0; i < ExactConfig::kMaxPieces; ++i) {
      const float factor = relative(totals[i].max, largest);
      total.sum += totals[i].sum * factor;
      output += outputs[i] * factor;
    }
    totals[0] = total;
    outputs[0] = output;
  }
  /// Adds what was merged to what the coded tokens give.
  __device__ __forceinline__ void add_to(RowSum& total, float& output) const {
    const float largest = fmaxf(total.max, totals[0].max);
    const float keep = relative(total.max, largest), factor = relative(totals[0].max, largest);
    total = {largest, total.sum * keep + totals[0].sum * factor};
    output = output * keep + outputs[0] * factor;
  }
};

/// A thread's share of a chunk of the decoder: every kShares-th entry of its channel, read
/// some at once.
template <class Shape>
struct DecoderShare {
  static constexpr int kAtOnce =
      Shape::kSums / kShares<Shape> < 16 ? Shape::kSums / kShares<Shape> : 16;
  const float* column;  ///< of the thread's first sum
  Index row_size;
  float entries[kAtOnce];

  __device__ __forceinline__ DecoderShare(const Problem& p, const float* decoder, int head,
                                          int first_sum)
      : row_size(Shape::kPerHead ? Shape::kDim : p.num_kv_heads * Shape::kDim) {
    const int channel = static_cast<int>(threadIdx.x) % Shape::kDim;
    const int share = static_cast<int>(threadIdx.x) / Shape::kDim;
    column = decoder + (first_sum + share) * row_size + (Shape::kPerHead ? 0 : head * Shape::kDim) +
             channel;
  }
  __device__ __forceinline__ void load(int first) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) entries[i] = column[row_size * (first + i * kShares<Shape>)];
  }
  __device__ __forceinline__ void next_chunk() {
    column += Shape::kSums * row_size;
    load(0);
  }
  /// Adds the entries times the sums, of all rows. The first entries have been read.
  __device__ __forceinline__ void decode(const float4 (&sums)[Shape::kSums], float4& outputs) {
    const int share = static_cast<int>(threadIdx.x) / Shape::kDim;
#pragma unroll 1
    for (int first = 0; first < Shape::kSums; first += kShares<Shape> * kAtOnce) {
      if (first > 0) load(first);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float4 four = sums[first + i * kShares<Shape> + share];
        outputs.x += four.x * entries[i];
        outputs.y += four.y * entries[i];
        outputs.z += four.z * entries[i];
        outputs.w += four.w * entries[i];
      }
    }
  }
};

/// A chunk's sums of the rows over all parts.
template <class Shape>
__device__ __forceinline__ void merge_chunk(const Problem& p, const Place& place, PartRange parts,
                                            int first_sum, Shared<Shape>& shared) {
#pragma unroll 1
  for (int item = threadIdx.x; item < kRows * Shape::kSums; item += Shape::kThreads) {
    const int lane = item % kMergingLanes, row = item / Shape::kSums;
    const int first = item % Shape::kSums - lane;
    Merged<Shape> merged(p, parts, place.seq, place.first_call_row + min(row, place.rows - 1),
                         first_sum + first, lane);
    merged.gather_lanes();
    const float4 sums = merged.sums;
    (&shared.sums[first + lane].x)[row] = lane == 0   ? sums.x
                                          : lane == 1 ? sums.y
                                          : lane == 2 ? sums.z
                                                      : sums.w;
    if (item % Shape::kSums == 0) shared.coded[row] = merged.total;
  }
}

/// Writes this block's outputs for the one that finishes, and counts it. True for the last one.
template <class Shape>
__device__ __forceinline__ bool hand_over(const Problem& p, const Place& place, float* outputs,
                                          Index stride, const float (&mine)[kOutputs<Shape>],
                                          Shared<Shape>& shared) {
#pragma unroll
  for (int i = 0; i < kOutputs<Shape>; ++i)
    outputs[place.block * Shape::kDim + i * kShares<Shape> * stride] = mine[i];
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared.finished = atomicAdd(p.counters + place.row_block, 1);
  __syncthreads();
  if (static_cast<int>(shared.finished) + 1 != p.num_combine_blocks) return false;
  __threadfence();
  return true;
}

__device__ __forceinline__ void store(const Problem& p, const Place& place, bool valid, int row,
                                      int channel, RowSum total, float output) {
  const int head_row = place.first_row + row;
  const Index target =
      (Index{place.seq} * p.num_query_tokens + head_row / p.group) * (p.num_kv_heads * p.group) +
      place.head * p.group + head_row % p.group;
  store_float(p.output, p.type, target * p.head_dim + channel,
              valid ? __fdividef(output, total.sum) : NAN);
  if (channel == 0 && p.lse != nullptr)
    p.lse[target] = valid ? (total.max + log2f(total.sum)) * 0.693147180559945f : NAN;
}

template <class Shape>
__device__ __forceinline__ void run(const Problem& p, const float* decoder) {
  __shared__ Shared<Shape> shared;
  constexpr int kDim = Shape::kDim;
  const Place place(p);
  const int channel = static_cast<int>(threadIdx.x) % kDim, share = threadIdx.x / kDim;
  const int chunks = Shape::kPerHead ? 1 : num_chunks(p);
  const int first_chunk = part_begin(chunks, place.block, p.num_combine_blocks);
  const int end_chunk = part_begin(chunks, place.block + 1, p.num_combine_blocks);
  int first_sum = (Shape::kPerHead ? place.head : first_chunk) * Shape::kSums;
  DecoderShare<Shape> decoder_share(p, decoder, place.head, first_sum);
  decoder_share.load(0);  // while the previous kernel ends
  // Sums of all heads are added up by a kernel which starts this one when those before have ended;
  // sums of a head by the call's first one.
  if (Shape::kPerHead) wait_for_previous_kernel();
  // A thread finishes the outputs of its channel and rows share, share + kShares, ...
  Exact<Shape> exact[kOutputs<Shape>];
#pragma unroll
  for (int i = 0; i < kOutputs<Shape>; ++i)
    exact[i].load(p, place.seq,
                  place.first_call_row + min(share + i * kShares<Shape>, place.rows - 1), channel);
  const int total = total_blocks(p);
  const bool valid = fits(p, total) && p.seq_lens[place.seq] >= p.num_query_tokens;
  const PartRange parts = valid ? parts_of(p, total, place.seq) : PartRange{};
  if (!Shape::kPerHead) {
#pragma unroll
    for (Exact<Shape>& of_output : exact) of_output.merge();
    wait_for_previous_kernel();
  }
  float4 outputs{};
#pragma unroll 1
  for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
    if (chunk > first_chunk) {
      __syncthreads();  // nobody needs the last chunk's sums any more
      decoder_share.next_chunk();
      first_sum += Shape::kSums;
    }
    merge_chunk(p, place, parts, first_sum, shared);
    __syncthreads();
    decoder_share.decode(shared.sums, outputs);
  }
  shared.shares[share][0][channel] = outputs.x;
  shared.shares[share][1][channel] = outputs.y;
  shared.shares[share][2][channel] = outputs.z;
  shared.shares[share][3][channel] = outputs.w;
  __syncthreads();
  float mine[kOutputs<Shape>] = {};
#pragma unroll
  for (int i = 0; i < kOutputs<Shape>; ++i)
#pragma unroll
    for (int other = 0; other < kShares<Shape>; ++other)
      mine[i] += shared.shares[other][share + i * kShares<Shape>][channel];
  if (p.num_combine_blocks > 1) {
    // [row][block][channel]
    const Index stride = Index{p.num_combine_blocks} * kDim;
    float* const all =
        p.block_outputs + (Index{place.row_block} * kRows + share) * stride + channel;
    if (!hand_over<Shape>(p, place, all, stride, mine, shared)) return;
#pragma unroll
    for (int i = 0; i < kOutputs<Shape>; ++i) {
      mine[i] = 0;
#pragma unroll 8
      for (int block = 0; block < p.num_combine_blocks; ++block)
        mine[i] += __ldcg(all + block * kDim + i * kShares<Shape> * stride);
    }
  }
#pragma unroll
  for (int i = 0; i < kOutputs<Shape>; ++i) {
    const int row = share + i * kShares<Shape>;
    if (row >= place.rows) break;
    RowSum row_total = shared.coded[row];
    if (Shape::kPerHead) exact[i].merge();
    exact[i].add_to(row_total, mine[i]);
    store(p, place, valid, row, channel, row_total, mine[i]);
  }
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 512 / Shape::kThreads)
    combine_kernel(const __grid_constant__ Problem problem, const float* decoder) {
  let_next_kernel_start();
  run<Shape>(problem, decoder);
}

/// Launches the combination of a call whose parts the stream's previous kernel gathers. Returns the
/// launch's error.
template <class Shape>
cudaError_t launch(const Problem& p, const float* decoder, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.num_combine_blocks * row_blocks(p)),
                  static_cast<unsigned>(p.num_kv_heads), static_cast<unsigned>(p.batch));
  return launch_early(combine_kernel<Shape>, grid, Shape::kThreads, 0, stream, p, decoder);
}

}  // namespace commvq::cuda::combine
