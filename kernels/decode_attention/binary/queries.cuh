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
  const int row = threadIdx.x / 32, lane = threadIdx.x % 32;
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

/// Turns the queries for step `step` of the segment.
template <class Shape>
__device__ __forceinline__ void turn_queries(const Arguments& a, Shared<Shape>& shared, int step,
                                             int tile) {
  // A thread turns two pairs to one place.
  constexpr int kHighItems = 4 * Shape::kHighEights;
  constexpr int kItems = kHighItems + Shape::kLowEights * 4 * kNodes;
  static_assert(kItems <= kTileWarps * 32, "one item a thread");
  const int item = threadIdx.x % (kTileWarps * 32);
  if (item >= kItems) return;
  TileBuffers<Shape>& buffers = shared.tiles[tile];
  const bool is_high = item < kHighItems;
  const int node = is_high ? 0 : (item - kHighItems) % kNodes;
  const int pair = 2 * (is_high ? item : kHighItems + (item - kHighItems) / kNodes);
  const int place =
      (step * Shape::kTiles + tile) * Config::kTileTokens + (is_high ? 0 : a.keys.nodes[node]);
  const Index distance = shared.segment.last_position - shared.segment.first_token - place;
  // Lane 4g + q of an operand holds column g, pairs 2q and 2q + 1 of eight.
  uint2* const target =
      (is_high ? buffers.high_queries[step % 4][pair / 8]
               : buffers.low_queries[step % 2][pair / 8 - Shape::kHighEights][node / 2]) +
      node % 2 * 4 + pair % 8 / 2;
  float2 first = make_float2(1, 0), second = first;
  int lag = -1;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (shared.lags[row] != lag) {
      lag = shared.lags[row];
      first = rotation_of(distance - lag, shared.pair_turns[pair]);
      second = rotation_of(distance - lag, shared.pair_turns[pair + 1]);
    }
    target[row * 8] =
        turned(*reinterpret_cast<const float4*>(&shared.queries[row][pair]), first, second);
  }
}

/// e^T q of sixteen codes a warp for step `step`, for the queries at all nodes: rows g and g + 8 of
/// a tile of codes are those of bits s and s + 16 of a word, operands together.
template <class Shape>
__device__ __forceinline__ void multiply_queries(Shared<Shape>& shared, int step, int tile) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  TileBuffers<Shape>& buffers = shared.tiles[tile];
#pragma unroll 1
  for (int code_tile = threadIdx.x / 32 % kTileWarps; code_tile < Shape::kCodeTiles;
       code_tile += kTileWarps) {
    float products[kNodes / 2][4] = {};
#pragma unroll
    for (int k = 0; k < Shape::kLowEights; ++k) {
      const uint4 e = shared.low_entries[code_tile][k][lane];
#pragma unroll
      for (int n = 0; n < kNodes / 2; ++n) {
        const uint2 query = buffers.low_queries[step % 2][k][n][lane];
        mma_16x8x16(products[n], e.x, e.y, e.z, e.w, query.x, query.y);
      }
    }
    // Word q of a lane's four, bit s = 8 (tile % 2) + g.
    const int bit_step = code_tile / 8 * 8 + code_tile % 2 * 4 + g / 2;
    const int word = code_tile % 8 / 2;
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      auto* const target = reinterpret_cast<std::uint32_t*>(
          &buffers
               .low_products[step % 3][bit_step][slot_of(bit_step, (2 * q + column) * 4 + word)]);
#pragma unroll
      for (int n = 0; n < kNodes / 2; ++n)
        target[2 * n + g % 2] =
            as_bits(__floats2half2_rn(products[n][column], products[n][2 + column]));
    }
  }
}

}  // namespace commvq::cuda::binary_attention
