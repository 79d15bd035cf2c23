#pragma once

#include "common/memory.cuh"
#include "common/mma.cuh"
#include "common/rope.cuh"
#include "common/wgmma.cuh"
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

__device__ __forceinline__ float2 product_of(float2 a, float2 b) {
  return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x);
}

/// Products of sixteen turned queries a warp with the pairs that are not decoded of eight eights of
/// codes, from `codes` on.
template <class Shape>
__device__ __forceinline__ void multiply(const Shared<Shape>& shared, int codes,
                                         const std::uint32_t (&queries)[Shape::kLowEights][4],
                                         float (&products)[8][4]) {
  constexpr int kEightBytes = 128, kPartBytes = Shape::kCodeEights * kEightBytes;
#if COMMVQ_WGMMA
  const WgmmaOperand e(shared_address(shared.low_entries), kPartBytes, kEightBytes);
  wgmma_begin();
#pragma unroll
  for (int k = 0; k < Shape::kLowEights; ++k)
    wgmma(products, queries[k], e.at(2 * k * kPartBytes + codes * kEightBytes), k > 0);
  wgmma_commit();
  wgmma_wait<0>(products);
#else
  const int lane = threadIdx.x % 32;
  // Lane 8 i + j reads code j of matrix i: real and imaginary parts of two eights of codes.
  const std::uint32_t place =
      shared_address(&shared.low_entries[0][lane / 8 % 2][codes + lane / 16][lane % 8 * 4]);
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd)
#pragma unroll
      for (float& product : products[i + odd]) product = 0;
#pragma unroll
    for (int k = 0; k < Shape::kLowEights; ++k) {
      const std::uint32_t(&q)[4] = queries[k];
      const uint4 e = load_matrices(place + 2 * k * kPartBytes + i * kEightBytes);
      mma_16x8x16(products[i], q[0], q[1], q[2], q[3], e.x, e.y);
      mma_16x8x16(products[i + 1], q[0], q[1], q[2], q[3], e.z, e.w);
    }
  }
#endif
}

/// Turns the queries of a group of steps of a tile, from `step` on, to the rounds' first tokens.
template <class Shape>
__device__ __forceinline__ void turn_high_queries(Shared<Shape>& shared, int step, int tile) {
  // A thread turns two pairs to one place.
  constexpr int kGroupRounds = Shape::kGroupSteps * kRounds;
  constexpr int kItems = 4 * Shape::kHighEights * kGroupRounds;
  auto& queries = shared.turned[tile].high;
  const Index first = Index{shared.segment.last_position} - shared.segment.first_token -
                      (step * Shape::kTiles + tile) * Config::kTileTokens;
#pragma unroll 1
  for (int item = threadIdx.x % (32 * kTileWarps); item < kItems; item += 32 * kTileWarps) {
    const int round = item % kGroupRounds, pair = item / kGroupRounds * 2;
    const int place =
        round / kRounds * (Shape::kTiles * Config::kTileTokens) + round % kRounds * kRoundTokens;
    float2 turn[2];
    int lag = -1;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (shared.lags[row] != lag) {
        lag = shared.lags[row];
        for (int i = 0; i < 2; ++i)
          turn[i] = rotation_of(first - place - lag, shared.pair_turns[pair + i]);
      }
      // Lane 4g + q of an operand holds column g, pairs 2q and 2q + 1 of eight; columns 2r and
      // 2r + 1 are row r.
      queries[round / kRounds][round % kRounds][pair / 8][row * 4 + pair % 8 / 2] =
          turned(*reinterpret_cast<const float4*>(&shared.queries[row][pair]), turn[0], turn[1]);
    }
  }
}

/// e^T q at the nodes of the tiles of a group of steps, from `step` on: a warp takes one step.
/// Column g is row g / 2 at node g % 2, column 8 + g the same row at node 2 + g % 2.
template <class Shape>
__device__ __forceinline__ void multiply_queries(const BinaryKeys& keys, Shared<Shape>& shared,
                                                 int step, int tile) {
  constexpr int kEights = Shape::kLowEights, kSteps = Shape::kGroupSteps;
  const int lane = threadIdx.x % 32, row = lane / 8, node = lane / 4 % 2;
  const int warp = threadIdx.x / 32 % kTileWarps;
  const int place = ((step + warp) * Shape::kTiles + tile) * Config::kTileTokens +
                    (node == 0 ? keys.nodes[0] : keys.nodes[1]);
  const Index distance =
      Index{shared.segment.last_position} - shared.segment.first_token - place - shared.lags[row];
  std::uint32_t queries[kEights][4];
#pragma unroll
  for (int i = 0; i < kEights; ++i) {
    const int pair = 8 * (Shape::kHighEights + i) + 2 * (lane % 4);
    const float4 query = *reinterpret_cast<const float4*>(&shared.queries[row][pair]);
    float2 first = rotation_of(distance, shared.pair_turns[pair]),
           second = rotation_of(distance, shared.pair_turns[pair + 1]);
    const uint2 at_first = turned(query, first, second);
    const float4 further = *reinterpret_cast<const float4*>(&shared.node_turns[pair]);
    first = product_of(first, make_float2(further.x, further.y));
    second = product_of(second, make_float2(further.z, further.w));
    const uint2 at_second = turned(query, first, second);
    queries[i][0] = at_first.x, queries[i][1] = at_second.x;
    queries[i][2] = at_first.y, queries[i][3] = at_second.y;
    // Not later than here.
    asm volatile(""
                 : "+r"(queries[i][0]), "+r"(queries[i][1]), "+r"(queries[i][2]),
                   "+r"(queries[i][3]));
  }
#pragma unroll
  for (int codes = 0; codes < Shape::kCodeEights; codes += 8) {
    float products[8][4];
    multiply<Shape>(shared, codes, queries, products);
    if (warp >= kSteps) continue;
    auto& columns = shared.turned[tile].low[warp];
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int eight = 0; eight < 2; ++eight)
        columns[eight][codes + i][lane] =
            as_bits(__floats2half2_rn(products[i][2 * eight], products[i][2 * eight + 1]));
  }
}

}  // namespace commvq::cuda::binary_attention
