#pragma once

#include "common/memory.cuh"
#include "common/mma.cuh"
#include "common/rope.cuh"
#include "decode_attention/binary/shape.cuh"

namespace commvq::cuda::binary_attention {

/// Reads the queries of a sequence: one warp a row.
template <class Shape>
__device__ __forceinline__ void load_queries(const Arguments& a, Shared<Shape>& shared, int seq,
                                             int head, int first_row, int rows) {
  const Problem& p = a.problem;
  const int thread = forgotten<Shape::kThreads>(static_cast<int>(threadIdx.x));
  const int row = thread / 32, lane = thread % 32;
  if (row >= kRows) return;
  float2 query[2] = {};
  float largest = 0;
  const int query_token = (first_row + row) / p.group;
  if (row < rows) {
    const int q_head = head * p.group + (first_row + row) % p.group;
    const Index base =
        ((Index{seq} * p.num_query_tokens + query_token) * p.num_kv_heads * p.group + q_head) *
        p.head_dim;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::uint16_t* const channel = p.channels + lane + 32 * i;
      query[i].x = load_float(p.queries, p.type, base + channel[0]);
      query[i].y = load_float(p.queries, p.type, base + channel[p.head_dim / 2]);
      largest = fmaxf(largest, fmaxf(fabsf(query[i].x), fabsf(query[i].y)));
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  // NaN and infinity pass through: such queries give NaN.
  const float factor = largest > 0 ? 1 / largest : 1.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    shared.queries[row][lane + 32 * i] = make_float2(query[i].x * factor, query[i].y * factor);
  if (lane == 0) {
    shared.low_factors[row] = p.score_scale / factor * a.keys.low_factors[head];
    shared.high_factors[row] = p.score_scale / factor * a.keys.high_factors[head];
    shared.lags[row] = row < rows ? p.num_query_tokens - 1 - query_token : 0;
  }
}

/// Two pairs of a query, turned: real parts, then imaginary parts, as an operand holds them.
__device__ __forceinline__ uint2 turned(float4 query, float2 first, float2 second) {
  return make_uint2(as_bits(__floats2half2_rn(query.x * first.x - query.y * first.y,
                                              query.z * second.x - query.w * second.y)),
                    as_bits(__floats2half2_rn(query.x * first.y + query.y * first.x,
                                              query.z * second.y + query.w * second.x)));
}

/// Turns the queries of a tile for step `step` of the segment.
template <class Shape>
__device__ __forceinline__ void turn_queries(const Arguments& a, Shared<Shape>& shared, int step,
                                             int tile) {
  // A thread turns two pairs to one place.
  constexpr int kHighItems = 4 * Shape::kHighEights * kRounds;
  constexpr int kItems = kHighItems + Shape::kLowEights * 4 * kNodes;
  static_assert(kItems <= kTileWarps * 32, "one item a thread");
  const int item = forgotten<kTileWarps * 32>(static_cast<int>(threadIdx.x) % (kTileWarps * 32));
  if (item >= kItems) return;
  TurnedQueries<Shape>& queries = shared.turned[tile];
  const bool is_high = item < kHighItems;
  const int round = item % kRounds, node = (item - kHighItems) % kNodes;
  const int pair =
      2 * (is_high ? item / kRounds : 4 * Shape::kHighEights + (item - kHighItems) / kNodes);
  const int place = (step * Shape::kTiles + tile) * Config::kTileTokens +
                    (is_high ? round * kRoundTokens : a.keys.nodes[node]);
  const Index distance = shared.segment.last_position - shared.segment.first_token - place;
  // High: lane 4g + q of an operand holds column g, pairs 2q and 2q + 1 of eight; rows take the
  // even columns. Low: row g of an operand is row g / 2 at node g % 2, row 8 + g at node 2 + g % 2.
  std::uint32_t* const target =
      is_high
          ? &queries.high[step % 2][round][pair / 8][pair % 8 / 2].x
          : &queries.low[pair / 8 - Shape::kHighEights][node % 2 * 4 + pair % 8 / 2].x + node / 2;
  const int row_stride = is_high ? 8 * 2 : 8 * 4, imag = is_high ? 1 : 2;
  float2 first = make_float2(1, 0), second = first;
  int lag = -1;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (shared.lags[row] != lag) {
      lag = shared.lags[row];
      first = rotation_of(distance - lag, shared.pair_turns[pair]);
      second = rotation_of(distance - lag, shared.pair_turns[pair + 1]);
    }
    const uint2 parts =
        turned(*reinterpret_cast<const float4*>(&shared.queries[row][pair]), first, second);
    target[row * row_stride] = parts.x;
    target[row * row_stride + imag] = parts.y;
  }
}

/// e^T q at the nodes: the tile's own columns of what key codes are multiplied with. A warp takes
/// some pairs of eights of codes.
template <class Shape>
__device__ __forceinline__ void multiply_queries(Shared<Shape>& shared, int tile) {
  if constexpr (Shape::kLowEights > 0) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kTileWarps;
    uint4 queries[Shape::kLowEights];
#pragma unroll
    for (int k = 0; k < Shape::kLowEights; ++k) queries[k] = shared.turned[tile].low[k][lane];
#pragma unroll
    for (int i = 0; i < Shape::kCodeEights / 2 / kTileWarps; ++i) {
      const int eights = 2 * (i * kTileWarps + warp);
      float products[2][4] = {};
#pragma unroll
      for (int k = 0; k < Shape::kLowEights; ++k) {
        const uint4 query = queries[k], e = shared.low_entries[eights / 2][k][lane];
        mma_16x8x16(products[0], query.x, query.y, query.z, query.w, e.x, e.y);
        mma_16x8x16(products[1], query.x, query.y, query.z, query.w, e.z, e.w);
      }
#pragma unroll
      for (int odd = 0; odd < 2; ++odd)
#pragma unroll
        for (int column = 0; column < 2; ++column)
          shared.operand(tile)[column][eights + odd][lane] =
              as_bits(__floats2half2_rn(products[odd][2 * column], products[odd][2 * column + 1]));
    }
  }
}

}  // namespace commvq::cuda::binary_attention
