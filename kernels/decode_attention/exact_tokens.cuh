#pragma once

#include "common/memory.cuh"
#include "common/rope.cuh"
#include "decode_attention/config.hpp"
#include "decode_attention/problem.cuh"

/// Attention of one query token over the tokens that have exact copies, for the query heads of one
/// KV head: flash attention in fp32, a chunk of tokens at a time.
namespace commvq::cuda::exact_tokens {

using Config = ExactConfig;

/// Shared memory, for heads of `dim` channels and `group` query heads.
struct Shared {
  std::uint8_t* keys;    ///< [kChunkTokens][dim] as stored
  std::uint8_t* values;  ///< likewise
  float2* queries;       ///< [group][dim / 2], turned to the query's position
  float* outputs;        ///< [kTokenGroups][group][dim]
  float* weights;        ///< [group][kChunkTokens]: scores, then weights
  float* keeps;          ///< [group]: what earlier chunks' outputs are to be multiplied by
  RowSum* sums;          ///< [group]

  __device__ Shared(std::uint8_t* memory, int dim, int group) {
    keys = memory;
    values = keys + Config::kChunkTokens * dim * 2;
    queries = reinterpret_cast<float2*>(values + Config::kChunkTokens * dim * 2);
    outputs = reinterpret_cast<float*>(queries + group * dim / 2);
    weights = outputs + Config::kTokenGroups * group * dim;
    keeps = weights + group * Config::kChunkTokens;
    sums = reinterpret_cast<RowSum*>(keeps + group + group % 2);
  }
  static constexpr int bytes(int dim, int group) {
    return Config::kChunkTokens * dim * 4 +
           4 * group * (dim * (1 + Config::kTokenGroups) + Config::kChunkTokens + 4);
  }
};

/// What a thread block computes: one KV head of one query token.
struct Item {
  int seq;
  int query_token;
  int head;
};

__device__ __forceinline__ void load_queries(const Problem& p, const Item& item, int position,
                                             const Shared& shared) {
  const int pairs = p.head_dim / 2;
  const Index first = ((Index{item.seq} * p.num_query_tokens + item.query_token) * p.num_kv_heads +
                       item.head) * p.group * p.head_dim;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.group * pairs; i += Config::kThreads) {
    const int pair = i % pairs;
    const Index head = first + Index{i / pairs} * p.head_dim;
    const float re = load_float(p.queries, p.type, head + p.channels[pair]);
    const float im = load_float(p.queries, p.type, head + p.channels[pairs + pair]);
    const float2 turn = rotation_of(position, p.turns[pair]);
    shared.queries[i] = make_float2(re * turn.x - im * turn.y, re * turn.y + im * turn.x);
  }
}

/// Starts copying keys and values of tokens `[first, first + count)`.
__device__ __forceinline__ void copy_tokens(const Problem& p, const Item& item, int first,
                                            int count, const Shared& shared) {
  const int vectors = p.head_dim / 8;  // of 16 bytes a head
  const Index slot = p.exact_slots[item.seq];
#pragma unroll 1
  for (int i = threadIdx.x; i < count * vectors; i += Config::kThreads) {
    const Index row = p.exact.row(slot, first + i / vectors) * p.num_kv_heads + item.head;
    const Index at = (row * p.head_dim + i % vectors * 8) * 2;
    copy_async_16(shared_address(shared.keys + i * 16),
                  static_cast<const std::uint8_t*>(p.exact.keys) + at);
    copy_async_16(shared_address(shared.values + i * 16),
                  static_cast<const std::uint8_t*>(p.exact.values) + at);
  }
}

/// Scores: a warp a token, a lane a few pairs of the head.
__device__ __forceinline__ void score(const Problem& p, int first, int count,
                                      const Shared& shared) {
  const int lane = threadIdx.x % 32, pairs = p.head_dim / 2;
#pragma unroll 1
  for (int t = threadIdx.x / 32; t < count; t += Config::kThreads / 32) {
    float2 key[Config::kMaxDim / 64];
#pragma unroll
    for (int i = 0; i < Config::kMaxDim / 64; ++i) {
      const int pair = lane + 32 * i;
      if (pair >= pairs) break;
      const float re = load_float(shared.keys, p.exact.type, t * p.head_dim + p.channels[pair]);
      const float im =
          load_float(shared.keys, p.exact.type, t * p.head_dim + p.channels[pairs + pair]);
      const float2 turn = rotation_of(first + t, p.turns[pair]);
      key[i] = make_float2(re * turn.x - im * turn.y, re * turn.y + im * turn.x);
    }
#pragma unroll 1
    for (int row = 0; row < p.group; ++row) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < Config::kMaxDim / 64; ++i) {
        const int pair = lane + 32 * i;
        if (pair >= pairs) break;
        const float2 query = shared.queries[row * pairs + pair];
        sum += query.x * key[i].x + query.y * key[i].y;
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (lane == 0) {
        sum *= p.score_scale;
        if (p.soft_cap > 0) sum = p.soft_cap * tanhf(sum / p.soft_cap);
        shared.weights[row * Config::kChunkTokens + t] = sum;
      }
    }
  }
}

/// Scores to weights relative to the largest so far: a warp a query head.
__device__ __forceinline__ void weigh(const Problem& p, int count, const Shared& shared) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < p.group; row += Config::kThreads / 32) {
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

/// Adds values: a thread takes one channel and, with others, every kTokenGroups-th token.
__device__ __forceinline__ void add_values(const Problem& p, int count, const Shared& shared) {
  const int dim = p.head_dim;
#pragma unroll 1
  for (int i = threadIdx.x; i < Config::kTokenGroups * dim; i += Config::kThreads) {
    const int channel = i % dim, token_group = i / dim;
#pragma unroll 1
    for (int row = 0; row < p.group; ++row) {
      float* const output = shared.outputs + (token_group * p.group + row) * dim + channel;
      const float* const weights = shared.weights + row * Config::kChunkTokens;
      float sum = *output * shared.keeps[row];
#pragma unroll 8
      for (int t = token_group; t < count; t += Config::kTokenGroups)
        sum += weights[t] * load_float(shared.values, p.exact.type, t * dim + channel);
      *output = sum;
    }
  }
}

/// Called by whole thread blocks.
__device__ __forceinline__ void run(const Problem& p, const Item& item, std::uint8_t* memory) {
  const int dim = p.head_dim;
  const Sequence sequence(p, item.seq);
  const int position = sequence.position(p, item.query_token);
  const Shared shared(memory, dim, p.group);
  for (int row = threadIdx.x; row < p.group; row += Config::kThreads)
    shared.sums[row] = {-INFINITY, 0};
#pragma unroll 1
  for (int i = threadIdx.x; i < Config::kTokenGroups * p.group * dim; i += Config::kThreads)
    shared.outputs[i] = 0;
  if (position >= 0 && p.exact.capacity > 0) {
    load_queries(p, item, position, shared);
    const int oldest = Sequence::oldest(p, position);
    // Sinks, then the window, as one range of tokens with a gap.
    const int sinks_end = min(p.exact.sinks, position + 1);
    const int window_begin = max(oldest, sequence.exact_begin(p, position));
    int first = oldest < sinks_end ? oldest : window_begin;
#pragma unroll 1
    while (first <= position) {
      const int end = first < sinks_end ? sinks_end : position + 1;
      const int count = min(Config::kChunkTokens, end - first);
      copy_tokens(p, item, first, count, shared);
      wait_for_copies();
      __syncthreads();
      score(p, first, count, shared);
      __syncthreads();
      weigh(p, count, shared);
      __syncthreads();
      add_values(p, count, shared);
      __syncthreads();
      first += count;
      if (first == sinks_end) first = max(first, window_begin);
    }
  }
  __syncthreads();
  const Index first_row = Index{item.seq} * p.num_rows + Index{item.head} * p.rows_per_head +
                          item.query_token * p.group;
  for (int row = threadIdx.x; row < p.group; row += Config::kThreads)
    p.exact_sums[first_row + row] = shared.sums[row];
#pragma unroll 1
  for (int i = threadIdx.x; i < p.group * dim; i += Config::kThreads) {
    float sum = 0;
#pragma unroll
    for (int token_group = 0; token_group < Config::kTokenGroups; ++token_group)
      sum += shared.outputs[token_group * p.group * dim + i];
    p.exact_outputs[first_row * dim + i] = sum;
  }
}

}  // namespace commvq::cuda::exact_tokens
