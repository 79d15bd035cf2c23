#pragma once

#include "common/memory.cuh"
#include "common/rope.cuh"
#include "decode_attention/config.hpp"
#include "decode_attention/exact_range.cuh"

/// Attention of one query token over the tokens that have exact copies, or a piece of them, for the
/// query heads of one KV head: flash attention in fp32, a chunk of tokens at a time.
namespace commvq::cuda::exact_tokens {

using Config = ExactConfig;

/// Shared memory, for heads of `dim` channels and `group` query heads.
template <int kThreads>
struct Shared {
  float2* keys;          ///< [kChunkTokens][dim / 2 + 1], turned by RoPE
  std::uint8_t* values;  ///< [kChunkTokens][dim] as stored
  float2* queries;       ///< [group][dim / 2], turned to the query's position
  float* outputs;        ///< [kThreads / dim][group][dim]: threads share a channel's tokens
  float* weights;        ///< [group][kChunkTokens]: scores, then weights
  int* rows;             ///< [kChunkTokens] of the exact copies, in the sequence's slot
  float* keeps;          ///< [group]: what earlier chunks' outputs are to be multiplied by
  RowSum* sums;          ///< [group]

  __device__ Shared(std::uint8_t* memory, int dim, int group) {
    keys = reinterpret_cast<float2*>(memory);
    values = memory + Config::kChunkTokens * (dim / 2 + 1) * sizeof(float2);
    queries = reinterpret_cast<float2*>(values + Config::kChunkTokens * dim * 2);
    outputs = reinterpret_cast<float*>(queries + group * dim / 2);
    weights = outputs + group * kThreads;
    rows = reinterpret_cast<int*>(weights + group * Config::kChunkTokens);
    keeps = reinterpret_cast<float*>(rows + Config::kChunkTokens);
    sums = reinterpret_cast<RowSum*>(keeps + group + group % 2);
  }
  static constexpr int bytes(int dim, int group) {
    return Config::kChunkTokens * (dim * 6 + 12) +
           4 * group * (dim + kThreads + Config::kChunkTokens + 4);
  }
};

/// What a thread block computes: one KV head of one query token over a piece of the exact tokens.
struct Item {
  int seq;
  int query_token;
  int head;
  int piece;
};

template <int kThreads>
__device__ __forceinline__ void load_queries(const Problem& p, const Item& item, int position,
                                             const Shared<kThreads>& shared) {
  const int pairs = p.head_dim / 2;
  const Index first =
      ((Index{item.seq} * p.num_query_tokens + item.query_token) * p.num_kv_heads + item.head) *
      p.group * p.head_dim;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.group * pairs; i += kThreads) {
    const int pair = i % pairs;
    const Index head = first + Index{i / pairs} * p.head_dim;
    const float re = load_float(p.queries, p.type, head + p.channels[pair]);
    const float im = load_float(p.queries, p.type, head + p.channels[pairs + pair]);
    const float2 turn = rotation_of(position, p.turns[pair]);
    shared.queries[i] = make_float2(re * turn.x - im * turn.y, re * turn.y + im * turn.x);
  }
}

/// Starts copying values, and reads and turns keys, of tokens `[first, first + count)`.
template <int kThreads>
__device__ __forceinline__ void load_tokens(const Problem& p, const Item& item, int first,
                                            int count, const Shared<kThreads>& shared) {
  const int vectors = p.head_dim / 8;  // of 16 bytes a head
  const int pairs = p.head_dim / 2;
  if (threadIdx.x < count)
    shared.rows[threadIdx.x] =
        static_cast<int>(p.exact.row(0, first + static_cast<int>(threadIdx.x)));
  __syncthreads();
  const Index slot_row = Index{p.exact_slots[item.seq]} * p.exact.rows_per_slot();
  const auto head_of = [&](int t) {
    return ((slot_row + shared.rows[t]) * p.num_kv_heads + item.head) * p.head_dim;
  };
#pragma unroll 1
  for (int i = threadIdx.x; i < count * vectors; i += kThreads)
    copy_async_16(shared_address(shared.values + i * 16),
                  static_cast<const std::uint8_t*>(p.exact.values) +
                      (head_of(i / vectors) + i % vectors * 8) * 2);
#pragma unroll 4
  for (int i = threadIdx.x; i < count * pairs; i += kThreads) {
    const int t = i / pairs, pair = i % pairs;
    const Index head = head_of(t);
    const float re = load_float(p.exact.keys, p.exact.type, head + p.channels[pair]);
    const float im = load_float(p.exact.keys, p.exact.type, head + p.channels[pairs + pair]);
    const float2 turn = rotation_of(first + t, p.turns[pair]);
    shared.keys[t * (pairs + 1) + pair] =
        make_float2(re * turn.x - im * turn.y, re * turn.y + im * turn.x);
  }
}

/// Scores: a thread a token and query head; two lanes share its pairs.
template <int kThreads>
__device__ __forceinline__ void score(const Problem& p, int count, const Shared<kThreads>& shared) {
  const int pairs = p.head_dim / 2, half = pairs / 2;
#pragma unroll 1
  for (int i = threadIdx.x; i < Config::kChunkTokens * p.group * 2; i += kThreads) {
    // Sixteen tokens a warp: the trip count is the same for all its lanes.
    const int part = i % 32 / 16;
    const int t = i / 32 * 16 % Config::kChunkTokens + i % 16;
    const int row = i / 32 * 16 / Config::kChunkTokens;
    const float2* const key = shared.keys + t * (pairs + 1) + part * half;
    const float2* const query = shared.queries + row * pairs + part * half;
    float sums[2] = {};
#pragma unroll 8
    for (int pair = 0; pair < half; ++pair) {
      sums[0] += query[pair].x * key[pair].x;
      sums[1] += query[pair].y * key[pair].y;
    }
    float sum = sums[0] + sums[1];
    sum += __shfl_xor_sync(~0u, sum, 16);
    sum *= p.score_scale;
    if (p.soft_cap > 0) sum = p.soft_cap * tanhf(sum / p.soft_cap);
    if (part == 0) shared.weights[row * Config::kChunkTokens + t] = t < count ? sum : 0;
  }
}

/// Scores to weights relative to the largest so far: a warp a query head.
template <int kThreads>
__device__ __forceinline__ void weigh(const Problem& p, int count, const Shared<kThreads>& shared) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < p.group; row += kThreads / 32) {
    float* const weights = shared.weights + row * Config::kChunkTokens;
    const RowSum old = shared.sums[row];
    float largest = old.max, sum = 0;
    for (int t = lane; t < count; t += 32) largest = fmaxf(largest, weights[t]);
    for (int step = 16; step > 0; step /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    for (int t = lane; t < count; t += 32) {
      weights[t] = exp2_approx(weights[t] - largest);
      sum += weights[t];
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    const float keep = exp2_approx(old.max - largest);
    __syncwarp();
    if (lane == 0) {
      shared.keeps[row] = keep;
      shared.sums[row] = {largest, old.sum * keep + sum};
    }
  }
}

/// Adds values: a thread takes one channel and, with others, every (kThreads / dim)-th token, for
/// four query heads at once.
template <int kThreads>
__device__ __forceinline__ void add_values(const Problem& p, int count,
                                           const Shared<kThreads>& shared) {
  const int dim = p.head_dim;
  const int channel = threadIdx.x % dim, token_group = threadIdx.x / dim;
  const int token_groups = kThreads / dim;
  float* const outputs = shared.outputs + token_group * p.group * dim + channel;
#pragma unroll 1
  for (int first = 0; first < p.group; first += 4) {
    const int rows = min(4, p.group - first);
    float sums[4] = {};
#pragma unroll 4
    for (int t = token_group; t < count; t += token_groups) {
      const float value = load_float(shared.values, p.exact.type, t * dim + channel);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[i] += shared.weights[min(first + i, p.group - 1) * Config::kChunkTokens + t] * value;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= rows) break;
      float& output = outputs[(first + i) * dim];
      output = output * shared.keeps[first + i] + sums[i];
    }
  }
}

/// Called by whole thread blocks.
template <int kThreads>
__device__ __forceinline__ void run(const Problem& p, const Item& item, std::uint8_t* memory) {
  const int dim = p.head_dim;
  const Sequence sequence(p, item.seq);
  const int position = sequence.position(p, item.query_token);
  const Shared<kThreads> shared(memory, dim, p.group);
  for (int row = threadIdx.x; row < p.group; row += kThreads) shared.sums[row] = {-INFINITY, 0};
#pragma unroll 1
  for (int i = threadIdx.x; i < p.group * kThreads; i += kThreads) shared.outputs[i] = 0;
  if (position >= 0 && p.exact.capacity > 0) {
    load_queries(p, item, position, shared);
    const ExactRange range(p, sequence, position);
    const int end = part_begin(range.count, item.piece + 1, p.num_exact_pieces);
    int i = part_begin(range.count, item.piece, p.num_exact_pieces);
#pragma unroll 1
    while (i < end) {
      const int count = min(Config::kChunkTokens, min(end, range.run_end(i)) - i);
      load_tokens(p, item, range.token(i), count, shared);
      wait_for_copies();
      __syncthreads();
      score(p, count, shared);
      __syncthreads();
      weigh(p, count, shared);
      __syncthreads();
      add_values(p, count, shared);
      __syncthreads();
      i += count;
    }
  }
  __syncthreads();
  const Index first_row = Index{item.seq} * p.num_rows + Index{item.head} * p.rows_per_head +
                          item.query_token * p.group;
  for (int row = threadIdx.x; row < p.group; row += kThreads)
    p.exact_sums[(first_row + row) * p.num_exact_pieces + item.piece] = shared.sums[row];
#pragma unroll 1
  for (int i = threadIdx.x; i < p.group * dim; i += kThreads) {
    float sum = 0;
#pragma unroll 1
    for (int token_group = 0; token_group < kThreads / dim; ++token_group)
      sum += shared.outputs[token_group * p.group * dim + i];
    p.exact_outputs[((first_row + i / dim) * p.num_exact_pieces + item.piece) * dim + i % dim] =
        sum;
  }
}

}  // namespace commvq::cuda::exact_tokens
