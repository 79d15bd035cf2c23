#pragma once

#include "common/barrier.cuh"
#include "common/memory.cuh"
#include "common/mma.cuh"
#include "common/rope.cuh"
#include "decode_attention/key_scores/shared.cuh"

/// The queries of a sequence, turned to some tokens of every step.
namespace commvq::cuda::key_scores {

/// Reads the queries of a sequence: one warp a row.
template <int kWidth>
__device__ void load_queries(const Arguments& a, Shared<kWidth>& shared, int seq,
                             const Place& place) {
  const Problem& p = a.problem;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < place.rows; row += Config::kWarps) {
    const int query_token = (place.first_row + row) / p.group;
    const int q_head = place.head * p.group + (place.first_row + row) % p.group;
    const Index base =
        ((Index{seq} * p.num_query_tokens + query_token) * p.num_kv_heads * p.group + q_head) *
        p.head_dim;
    float2 query[kWidth / 32];
    float largest = 0;
    for (int i = 0; i < kWidth / 32; ++i) {
      const int pair = lane + 32 * i;
      query[i] = make_float2(0, 0);
      if (pair < a.slice.num_pairs) {
        const float unit = a.slice.units[place.head * kWidth + pair];
        const std::uint16_t* const channel = p.channels + a.slice.first_pair + pair;
        query[i].x = load_float(p.queries, p.type, base + channel[0]) * unit;
        query[i].y = load_float(p.queries, p.type, base + channel[p.head_dim / 2]) * unit;
      }
      largest = fmaxf(largest, fmaxf(fabsf(query[i].x), fabsf(query[i].y)));
    }
    for (int step = 16; step > 0; step /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    // NaN and infinity pass through: such queries give NaN.
    const float factor = largest > 0 ? 1 / largest : 1.0f;
    for (int i = 0; i < kWidth / 32; ++i)
      shared.unit_queries[row][lane + 32 * i] =
          make_float2(query[i].x * factor, query[i].y * factor);
    if (lane == 0) {
      shared.factors[row] = p.score_scale / factor * (a.slice.row_bits == 4 ? 512.0f : 1.0f);
      shared.lags[row] = p.num_query_tokens - 1 - query_token;
    }
  }
}

/// Turns the queries to the step's first token, `distance` before the last position, and to the
/// three tokens after it, and lays them out as fragments: lane 4g + q of a half holds column
/// g, pairs 8k + 2q and 8k + 2q + 1: real parts in b0, imaginary parts in b1. `thread` is one of
/// kTurningWarps * 32.
template <int kWidth>
__device__ __forceinline__ void turn_queries(const Arguments& a, Shared<kWidth>& shared,
                                             uint4* fragments, int distance, int rows, int thread) {
  constexpr int kWords = kWidth / 8;
  const std::uint64_t* const turns = a.problem.turns + a.slice.first_pair;
#pragma unroll 1
  for (int item = thread; item < rows * kWords * 4; item += Config::kTurningWarps * 32) {
    const int q = item % 4;
    const int k = item / 4 % kWords;
    const int row = item / (4 * kWords);
    const Index row_distance = distance - shared.lags[row];
    float real[2], imag[2];
    float2 back[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int pair = 8 * k + 2 * q + e;
      const float2 query = shared.unit_queries[row][pair];
      const float2 turn =
          pair < a.slice.num_pairs ? rotation_of(row_distance, turns[pair]) : make_float2(1, 0);
      back[e] = shared.one_turns[pair];
      real[e] = query.x * turn.x - query.y * turn.y;
      imag[e] = query.x * turn.y + query.y * turn.x;
    }
    uint4* const tile = fragments + row / Config::kTileRows * Shared<kWidth>::kTileVectors +
                        k / 2 * 32 + row % Config::kTileRows * 4 + q;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      uint2* const target =
          reinterpret_cast<uint2*>(tile + t % 2 * Shared<kWidth>::kHalfVectors + t / 2 * 16);
      target[k % 2] = make_uint2(as_bits(__floats2half2_rn(real[0], real[1])),
                                 as_bits(__floats2half2_rn(imag[0], imag[1])));
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float re = real[e];
        real[e] = re * back[e].x + imag[e] * back[e].y;
        imag[e] = imag[e] * back[e].x - re * back[e].y;
      }
    }
  }
}

/// Turns the queries of step `step` of the segment, if it is this warp's turn.
template <int kWidth>
__device__ __forceinline__ void turn_if_due(const Arguments& a, Shared<kWidth>& shared, int step) {
  const Segment& segment = shared.segment;
  const int number = segment.steps_before + step;
  constexpr int kTeams = Config::kWarps / Config::kTurningWarps;
  if (static_cast<int>(threadIdx.x) / (32 * Config::kTurningWarps) != number % kTeams) return;
  const int buffer = number % Config::kBuffers, round = number / Config::kBuffers;
  if (round > 0) Barrier(&shared.empty[buffer]).wait((round - 1) % 2);
  turn_queries<kWidth>(a, shared, shared.queries[buffer],
                       segment.last_position - segment.first_token - step * Config::kStepTokens,
                       segment.place.rows, threadIdx.x % (Config::kTurningWarps * 32));
  Barrier(&shared.full[buffer]).arrive();
}

}  // namespace commvq::cuda::key_scores
