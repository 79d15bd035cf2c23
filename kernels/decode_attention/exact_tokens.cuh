#pragma once

#include "common/memory.cuh"
#include "common/rope.cuh"
#include "decode_attention/config.hpp"
#include "decode_attention/problem.cuh"

/// Attention of one query token over the tokens that have exact copies, for the query heads of one
/// KV head: flash attention in fp32, a chunk of tokens at a time. There are few such tokens, so this
/// is written for clarity.
namespace commvq::cuda::exact_tokens {

using Config = ExactConfig;

/// Shared memory, for heads of `dim` channels and `group` query heads.
struct Shared {
  float* keys;     ///< [kChunkTokens][dim + 1], planar, turned
  float* values;   ///< [kChunkTokens][dim]
  float* queries;  ///< [group][dim], planar, turned
  float* outputs;  ///< [group][dim]
  float* weights;  ///< [group][kChunkTokens]
  RowSum* sums;    ///< [group]

  __device__ Shared(std::uint8_t* memory, int dim, int group) {
    keys = reinterpret_cast<float*>(memory);
    values = keys + Config::kChunkTokens * (dim + 1);
    queries = values + Config::kChunkTokens * dim;
    outputs = queries + group * dim;
    weights = outputs + group * dim;
    sums = reinterpret_cast<RowSum*>(weights + group * Config::kChunkTokens);
  }
  static constexpr int bytes(int dim, int group) {
    return 4 * (Config::kChunkTokens * (2 * dim + 1) + group * (2 * dim + Config::kChunkTokens)) +
           static_cast<int>(sizeof(RowSum)) * group;
  }
};

/// Reads `count` heads of `type`, turns each by RoPE to its position and writes it planar.
/// `row_of(i)` is the first element of head i, `position_of(i)` its position.
template <class RowOf, class PositionOf>
__device__ void load_turned(const Problem& p, const void* data,
                            FloatType type, int count, int stride, float* heads, RowOf row_of,
                            PositionOf position_of) {
  const int pairs = p.head_dim / 2;
#pragma unroll 1
  for (int item = threadIdx.x; item < count * pairs; item += Config::kThreads) {
    const int i = item / pairs, pair = item % pairs;
    const Index row = row_of(i);
    const float re = load_float(data, type, row + p.channels[pair]);
    const float im = load_float(data, type, row + p.channels[pairs + pair]);
    const float2 turn = rotation_of(position_of(i), p.turns[pair]);
    heads[i * stride + pair] = re * turn.x - im * turn.y;
    heads[i * stride + pairs + pair] = re * turn.y + im * turn.x;
  }
}

/// Scores of one chunk and their weights: a warp a query head, a lane a token.
__device__ __forceinline__ void weigh(const Problem& p, const Shared& shared, int count) {
  const int lane = threadIdx.x % 32;
  const int dim = p.head_dim;
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < p.group; row += Config::kThreads / 32) {
    float score = -INFINITY;
    if (lane < count) {
      score = 0;
#pragma unroll 8
      for (int d = 0; d < dim; ++d)
        score += shared.queries[row * dim + d] * shared.keys[lane * (dim + 1) + d];
      score *= p.score_scale;
      if (p.soft_cap > 0) score = p.soft_cap * tanhf(score / p.soft_cap);
    }
    float largest = score;
    for (int step = 16; step > 0; step /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    const RowSum old = shared.sums[row];
    largest = fmaxf(largest, old.max);
    const float weight = exp2f(score - largest);
    float sum = weight;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    const float keep = exp2f(old.max - largest);
    shared.weights[row * Config::kChunkTokens + lane] = weight;
    for (int d = lane; d < dim; d += 32) shared.outputs[row * dim + d] *= keep;
    __syncwarp();
    if (lane == 0) shared.sums[row] = {largest, old.sum * keep + sum};
  }
}

__device__ __forceinline__ void add_values(const Problem& p, const Shared& shared, int count) {
  const int dim = p.head_dim;
#pragma unroll 1
  for (int item = threadIdx.x; item < p.group * dim; item += Config::kThreads) {
    const int row = item / dim, d = item % dim;
    float sum = shared.outputs[item];
#pragma unroll 8
    for (int t = 0; t < count; ++t)
      sum += shared.weights[row * Config::kChunkTokens + t] * shared.values[t * dim + d];
    shared.outputs[item] = sum;
  }
}

/// Tokens `[begin, end)` of a sequence.
__device__ __forceinline__ void add_tokens(const Problem& p,
                                  const Shared& shared, int slot, int head, int begin, int end) {
  const int dim = p.head_dim;
  const auto row_of = [&](int token) {
    return (p.exact.row(slot, token) * p.num_kv_heads + head) * dim;
  };
#pragma unroll 1
  for (int first = begin; first < end; first += Config::kChunkTokens) {
    const int count = min(Config::kChunkTokens, end - first);
    load_turned(
        p, p.exact.keys, p.exact.type, count, dim + 1, shared.keys,
        [&](int i) { return row_of(first + i); }, [&](int i) { return first + i; });
#pragma unroll 1
    for (int item = threadIdx.x; item < count * dim; item += Config::kThreads)
      shared.values[item] =
          load_float(p.exact.values, p.exact.type, row_of(first + item / dim) + item % dim);
    __syncthreads();
    weigh(p, shared, count);
    __syncthreads();
    add_values(p, shared, count);
    __syncthreads();
  }
}

/// `item` is sequence * num_query_tokens + query token.
__device__ __forceinline__ void run(const Problem& p, int item, int head,
                           std::uint8_t* memory) {
  const int seq = item / p.num_query_tokens, query_token = item % p.num_query_tokens;
  const int dim = p.head_dim;
  const Sequence sequence(p, seq);
  const int position = sequence.position(p, query_token);
  const Shared shared(memory, dim, p.group);
  for (int row = threadIdx.x; row < p.group; row += Config::kThreads)
    shared.sums[row] = {-INFINITY, 0};
  for (int i = threadIdx.x; i < p.group * dim; i += Config::kThreads) shared.outputs[i] = 0;
  if (sequence.length >= p.num_query_tokens && p.exact.capacity > 0) {
    const Index first_query =
        ((Index{item} * p.num_kv_heads + head) * p.group) * dim;
    load_turned(
        p, p.queries, p.type, p.group, dim, shared.queries,
        [&](int i) { return first_query + Index{i} * dim; }, [&](int) { return position; });
    __syncthreads();
    const int oldest = Sequence::oldest(p, position);
    const int slot = p.exact_slots[seq];
#pragma unroll 1
    for (const bool sinks : {true, false})
      add_tokens(p, shared, slot, head,
                 sinks ? oldest : max(oldest, sequence.exact_begin(p, position)),
                 sinks ? min(p.exact.sinks, position + 1) : position + 1);
  }
  __syncthreads();
  const Index first_row =
      Index{seq} * p.num_rows + Index{head} * p.rows_per_head + query_token * p.group;
  for (int row = threadIdx.x; row < p.group; row += Config::kThreads)
    p.exact_sums[first_row + row] = shared.sums[row];
  for (int i = threadIdx.x; i < p.group * dim; i += Config::kThreads)
    p.exact_outputs[first_row * dim + i] = shared.outputs[i];
}

}  // namespace commvq::cuda::exact_tokens
