#pragma once

#include "common/barrier.cuh"
#include "common/memory.cuh"
#include "common/mma.cuh"
#include "common/rope.cuh"
#include "decode_attention/code_reader.cuh"
#include "decode_attention/config.hpp"
#include "decode_attention/problem.cuh"

/// Scores of coded keys. A thread block keeps the rows of one plane of one head in shared memory as
/// 8-bit integers and decodes every token once for all query heads that read it:
///
///   1. four threads of a warp add up a token's rows, 16 bytes each, four sums to a 32-bit word;
///   2. the sums become fp16 and are turned by the token's place within the step (constants in
///      registers), since turning commutes with adding rows;
///   3. they are operands of a matrix product with the queries, which were turned to the first
///      token of the step;
///   4. scores become weights relative to the maximum of 16 tokens, with the scale of the token's
///      value included, which is all that adding up values needs.
///
/// Reading rows keeps shared memory busy, the rest keeps the arithmetic units busy; so warps do not
/// wait for each other but for the turned queries, which a few of them make two steps ahead.
namespace commvq::cuda::key_scores {

using Config = KeyScoresConfig;

/// How the slices of a head's pairs and books take turns at the same scores.
enum class Turn { kOnly, kFirst, kMiddle, kLast };

struct Arguments {
  Problem problem;
  KeySlice slice;
  Turn turn;
};

/// What lies in shared memory before the rows. A tile of turned queries, for eight rows, is
/// [width / 16][32 lanes] of 16 bytes, as mma fragments.
template <int kWidth>
struct Shared {
  static constexpr int kTileVectors = kWidth / 16 * 32;
  static constexpr int kBufferVectors = Config::kMaxRows / 8 * kTileVectors;

  uint4 queries[Config::kBuffers][kBufferVectors];  ///< turned to the first token of a step
  float2 unit_queries[Config::kMaxRows][kWidth];    ///< times the pairs' units, brought to about 1
  uint2 zero_points[kWidth / 8 * 4];
  float factors[Config::kMaxRows];  ///< from sums of products to scores
  int lags[Config::kMaxRows];       ///< how far a row's position is from the last one
  std::uint64_t full[Config::kBuffers];
  std::uint64_t empty[Config::kBuffers];
};

/// Dynamic shared memory begins behind what the system reserves, at least so many bytes.
constexpr int kReservedBytes = 1024;

/// Shared memory of a launch, wherever it begins.
inline int shared_bytes(const KeySlice& slice) {
  const int before = slice.width == 64 ? sizeof(Shared<64>) : sizeof(Shared<32>);
  const int rows_at = (before + kReservedBytes + Config::kRowAlignment - 1) /
                      Config::kRowAlignment * Config::kRowAlignment;
  return rows_at - kReservedBytes + static_cast<int>(slice.row_bytes);
}

/// Where the rows begin.
template <int kWidth>
__device__ std::uint32_t rows_address(const std::uint8_t* memory) {
  const auto begin = static_cast<std::uint32_t>(__cvta_generic_to_shared(memory));
  return (begin + static_cast<std::uint32_t>(sizeof(Shared<kWidth>)) + Config::kRowAlignment - 1) /
         Config::kRowAlignment * Config::kRowAlignment;
}

/// What a thread block works on.
struct Place {
  int head;
  int first_row;  ///< of the head's
  int rows;
};

/// Reads the queries of a sequence: one warp a row.
template <int kWidth>
__device__ void load_queries(const Arguments& a, Shared<kWidth>& shared, int seq,
                             const Place& place) {
  const Problem& p = a.problem;
  const int lane = threadIdx.x % 32;
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
      shared.factors[row] = p.score_scale / factor;
      shared.lags[row] = p.num_query_tokens - 1 - query_token;
    }
  }
}

/// Turns the queries to token `base` and lays them out as fragments: lane 4g + q of tile t holds
/// query 8t + g, pairs 8k + 2q and 8k + 2q + 1: real parts in b0, imaginary parts in b1. `thread`
/// is one of kTurningWarps * 32.
template <int kWidth>
__device__ void turn_queries(const Arguments& a, Shared<kWidth>& shared, uint4* fragments,
                             int distance, int rows, int thread) {
  constexpr int kWords = kWidth / 8;
  const std::uint64_t* const turns = a.problem.turns + a.slice.first_pair;
  for (int item = thread; item < rows * kWords * 4; item += Config::kTurningWarps * 32) {
    const int q = item % 4;
    const int k = item / 4 % kWords;
    const int row = item / (4 * kWords);
    const Index row_distance = distance - shared.lags[row];
    float real[2], imag[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int pair = 8 * k + 2 * q + e;
      const float2 query = shared.unit_queries[row][pair];
      const float2 turn = pair < a.slice.num_pairs ? rotation_of(row_distance, turns[pair])
                                                   : make_float2(1, 0);
      real[e] = query.x * turn.x - query.y * turn.y;
      imag[e] = query.x * turn.y + query.y * turn.x;
    }
    uint2* const target = reinterpret_cast<uint2*>(
        fragments + row / 8 * Shared<kWidth>::kTileVectors + k / 2 * 32 + row % 8 * 4 + q);
    target[k % 2] = make_uint2(as_bits(__floats2half2_rn(real[0], real[1])),
                               as_bits(__floats2half2_rn(imag[0], imag[1])));
  }
}

/// Adds up the rows of a lane's two tokens: lane 4g + q decodes tokens g and g + 16 of a half block
/// with three other lanes.
template <int kWidth, class Reader>
__device__ __forceinline__ void sum_rows(std::uint32_t rows, const Reader (&readers)[2],
                                         std::uint32_t (&sums)[2][kWidth / 8]) {
  const int lane = threadIdx.x % 32;
  const int q = lane % 4;
  const bool odd = lane / 4 % 2 != 0;
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int i = 0; i < kWidth / 8; ++i) sums[t][i] = 0x80808080u;

  if constexpr (kWidth == 64) {
    // Odd tokens read the halves of a row in the other order: eight lanes then meet all 32 banks.
    const std::uint32_t part = rows + q * 16 + (odd ? 64 : 0);
    readers[0].for_each_book([&](auto book) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const std::uint32_t address = readers[t].row_address(book, part);
        const uint4 x = Reader::load(book, address);
        const uint4 y = Reader::load(book, address ^ 64);
        sums[t][0] += x.x, sums[t][1] += x.y, sums[t][2] += x.z, sums[t][3] += x.w;
        sums[t][4] += y.x, sums[t][5] += y.y, sums[t][6] += y.z, sums[t][7] += y.w;
      }
    });
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t first = sums[t][i], second = sums[t][i + 4];
        sums[t][i] = odd ? second : first;
        sums[t][i + 4] = odd ? first : second;
      }
  } else {
    // A line holds the rows of two books; odd tokens read the second one first.
    const std::uint32_t part = rows + q * 16;
    readers[0].for_each_pair([&](auto book) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const std::uint32_t even = readers[t].pair_address(book, 0, part);
        const std::uint32_t next = readers[t].pair_address(book, 1, part + 64);
        const uint4 x = load_shared_16<0>(odd ? next : even);
        const uint4 y = load_shared_16<0>(odd ? even : next);
        sums[t][0] += x.x + y.x, sums[t][1] += x.y + y.y;
        sums[t][2] += x.z + y.z, sums[t][3] += x.w + y.w;
      }
    });
  }
}

/// Cosines and sines of a thread's pairs for its two tokens of a step.
template <int kWidth>
struct TokenTurns {
  __half2 cosine[2][kWidth / 8];
  __half2 sine[2][kWidth / 8];

  __device__ TokenTurns(const Arguments& a, int offset) {
    const int q = threadIdx.x % 4;
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int k = 0; k < kWidth / 8; ++k) {
        float2 turn[2];
        for (int e = 0; e < 2; ++e) {
          const int pair = 8 * k + 2 * q + e;
          turn[e] = pair < a.slice.num_pairs
                        ? rotation_of(offset + 16 * t, a.problem.turns[a.slice.first_pair + pair])
                        : make_float2(1, 0);
        }
        cosine[t][k] = __floats2half2_rn(turn[0].x, turn[1].x);
        sine[t][k] = __floats2half2_rn(turn[0].y, turn[1].y);
      }
  }
};

/// Sums of rows to fp16 keys, turned: fragments a0 to a3 of each k.
template <int kWidth>
__device__ __forceinline__ void turn_keys(const std::uint32_t (&sums)[2][kWidth / 8],
                                          const uint2* zero_points, const TokenTurns<kWidth>& turns,
                                          std::uint32_t (&keys)[kWidth / 8][4]) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int k = 0; k < kWidth / 8; ++k) {
    const uint2 zero = zero_points[k * 4 + q];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      // A byte under 0x64 is the fp16 number 1024 + byte.
      const __half2 real =
          __hsub2(as_half2(__byte_perm(sums[t][k], 0x64646464u, 0x4140)), as_half2(zero.x));
      const __half2 imag =
          __hsub2(as_half2(__byte_perm(sums[t][k], 0x64646464u, 0x4342)), as_half2(zero.y));
      const __half2 c = turns.cosine[t][k], s = turns.sine[t][k];
      keys[k][t] = as_bits(__hfma2(real, c, __hneg2(__hmul2(imag, s))));
      keys[k][2 + t] = as_bits(__hfma2(real, s, __hmul2(imag, c)));
    }
  }
}

/// A token's key norm (low half) and value scale, both bf16.
using NormAndScale = std::uint32_t;

__device__ __forceinline__ float norm_of(NormAndScale bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ float scale_of(NormAndScale bits) {
  return __uint_as_float(bits & 0xffff0000u);
}

/// Where the weights of a lane's two tokens belong.
struct Target {
  Index block;  ///< in the workspace
  int half;
  int token;  ///< the first, in the sequence
};

/// Scores of two tokens and rows 2q, 2q + 1 of a tile to weights and their sums in the workspace.
/// Value scales below 2^-100 count as zero.
__device__ __forceinline__ void store_weights(const Problem& p, const Place& place,
                                              const Sequence& sequence, const Target& target,
                                              const NormAndScale (&data)[2], const int* lags,
                                              const float (&scores)[4], int tile) {
  const int lane = threadIdx.x % 32;
  constexpr float kLeastLog = -100.0f;
  float logs[2];
#pragma unroll
  for (int t = 0; t < 2; ++t) logs[t] = __log2f(scale_of(data[t]));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = tile * 8 + lane % 4 * 2 + i;
    const int position = sequence.length - 1 - lags[min(row, place.rows - 1)];
    const int begin = sequence.coded_begin(p, position);
    const int end = sequence.coded_end(p, position);
    float score[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      score[t] = scores[2 * t + i];
      if (p.soft_cap > 0) score[t] = p.soft_cap * tanhf(score[t] / p.soft_cap);
      const int token = target.token + 16 * t;
      if (token < begin || token >= end) score[t] = -INFINITY;
    }
    float largest = fmaxf(score[0] + fmaxf(logs[0], kLeastLog), score[1] + fmaxf(logs[1], kLeastLog));
#pragma unroll
    for (int step = 4; step < 32; step *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    const float reference = largest == -INFINITY ? 0.0f : largest;
    score[0] -= reference;
    score[1] -= reference;
    float sum = exp2_approx(score[0]) + exp2_approx(score[1]);
#pragma unroll
    for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (row >= place.rows) continue;
    const Index call_row = place.head * p.rows_per_head + place.first_row + row;
    // A scale that is NaN, of a token that could not be coded, shows.
    const __half2 weights =
        __floats2half2_rn(exp2_approx(score[0] + (logs[0] < kLeastLog ? -INFINITY : logs[0])),
                          exp2_approx(score[1] + (logs[1] < kLeastLog ? -INFINITY : logs[1])));
    p.weights[(target.block * p.row_stride + call_row) * 16 + target.half * 8 + lane / 4] =
        as_bits(weights);
    if (lane < 4)
      p.block_sums[(target.block * kHalves + target.half) * p.row_stride + call_row] = {largest,
                                                                                      sum};
  }
}

/// Adds what other slices found to the scores of two tokens and rows 2q, 2q + 1 of a tile.
__device__ inline void add_slices(const Problem& p, Turn turn, const Place& place,
                                  const Target& target, int tile, float (&scores)[4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = tile * 8 + lane % 4 * 2 + i % 2;
    if (row >= place.rows) continue;
    const Index call_row = place.head * p.rows_per_head + place.first_row + row;
    float* const raw = p.raw_scores + (target.block * p.row_stride + call_row) * kBlockTokens +
                       target.half * 8 + lane / 4 + i / 2 * 16;
    if (turn != Turn::kFirst) scores[i] += *raw;
    if (turn != Turn::kLast) *raw = scores[i];
  }
}

/// Products of a warp's sixteen keys with eight queries.
template <int kWidth>
__device__ __forceinline__ void multiply(const std::uint32_t (&keys)[kWidth / 8][4],
                                         const uint4* queries, float (&scores)[4]) {
#pragma unroll
  for (int k = 0; k < kWidth / 8; k += 2) {
    const uint4 q = queries[k / 2 * 32];
    mma_16x8x16(scores, keys[k][0], keys[k][1], keys[k][2], keys[k][3], q.x, q.y);
    mma_16x8x16(scores, keys[k + 1][0], keys[k + 1][1], keys[k + 1][2], keys[k + 1][3], q.z, q.w);
  }
}

/// A sequence's blocks in one part, in steps of kStepBlocks.
template <int kWidth, class Reader>
__device__ void run_segment(const Arguments& a, Shared<kWidth>& shared, std::uint32_t rows,
                            const TokenTurns<kWidth>& token_turns, const Place& place,
                            const Cursor& cursor, int offset, int& steps_done) {
  const Problem& p = a.problem;
  const KeyPlane& plane = p.layout.planes[a.slice.plane];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int count = cursor.count(INT_MAX);
  const int num_steps = (count + Config::kStepBlocks - 1) / Config::kStepBlocks;
  const Sequence sequence(p, cursor.seq);
  const int last_token = sequence.coded_end(p, sequence.length - 1) - 1;
  const int first_token = cursor.block * kBlockTokens;
  constexpr int kStepTokens = Config::kStepBlocks * kBlockTokens;

  // What a lane reads of its two tokens, a step ahead of their use.
  Reader readers[2];
  NormAndScale fetched[2];
  const std::int32_t* const table = p.block_table + Index{cursor.seq} * p.max_blocks;
  const auto fetch = [&](int step) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      // Beyond the last token there may be no page.
      const int token = min(first_token + step * kStepTokens + offset + 16 * t, last_token);
      const std::uint8_t* const page = p.pages + table[token >> p.page_shift] * p.page_stride;
      const int slot = token & (p.layout.page_size - 1);
      readers[t].fetch(p.layout, plane, page, place.head, slot);
      const std::uint32_t norm =
          *reinterpret_cast<const std::uint16_t*>(page + p.layout.key_norm(place.head, slot));
      const std::uint32_t scale =
          *reinterpret_cast<const std::uint16_t*>(page + p.layout.value_scale(slot));
      fetched[t] = norm | scale << 16;
    }
  };
  const auto turn_for = [&](int step) {
    const int number = steps_done + step;
    const int buffer = number % Config::kBuffers;
    const int group = number % (Config::kWarps / Config::kTurningWarps);
    if (step >= num_steps || warp / Config::kTurningWarps != group) return;
    const int round = number / Config::kBuffers;
    if (round > 0) WarpBarrier(&shared.empty[buffer]).wait((round - 1) % 2);
    turn_queries<kWidth>(a, shared, shared.queries[buffer],
                         sequence.length - 1 - first_token - step * kStepTokens, place.rows,
                         threadIdx.x % (Config::kTurningWarps * 32));
    WarpBarrier(&shared.full[buffer]).arrive();
  };

  turn_for(0);
  turn_for(1);
  fetch(0);
  for (int step = 0; step < num_steps; ++step) {
    const Reader current[2] = {readers[0], readers[1]};
    const NormAndScale data[2] = {fetched[0], fetched[1]};
    if (step + 1 < num_steps) fetch(step + 1);
    turn_for(step + 2);

    const int block = step * Config::kStepBlocks + warp / 2;
    const int number = steps_done + step;
    const int buffer = number % Config::kBuffers;
    const bool active = block < count;
    std::uint32_t keys[kWidth / 8][4];
    if (active) {
      std::uint32_t sums[2][kWidth / 8];
      sum_rows<kWidth>(rows, current, sums);
      turn_keys<kWidth>(sums, shared.zero_points, token_turns, keys);
    }
    WarpBarrier(&shared.full[buffer]).wait(number / Config::kBuffers % 2);
    if (active) {
      const Target target{Index{cursor.index} + block, warp % 2,
                          first_token + step * kStepTokens + offset};
      for (int tile = 0; tile * 8 < place.rows; ++tile) {
        float scores[4] = {};
        multiply<kWidth>(keys, shared.queries[buffer] + tile * Shared<kWidth>::kTileVectors + lane,
                         scores);
        const int row = tile * 8 + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          scores[i] *= norm_of(data[i / 2]) * shared.factors[min(row + i % 2, place.rows - 1)];
        if (a.turn != Turn::kOnly) {
          add_slices(p, a.turn, place, target, tile, scores);
          if (a.turn != Turn::kLast) continue;
        }
        store_weights(p, place, sequence, target, data, shared.lags, scores, tile);
      }
    }
    WarpBarrier(&shared.empty[buffer]).arrive();
  }
  steps_done += num_steps;
}

template <int kWidth, class Reader>
__device__ void run(const Arguments& a, std::uint8_t* memory) {
  const Problem& p = a.problem;
  Shared<kWidth>& shared = *reinterpret_cast<Shared<kWidth>*>(memory);
  const std::uint32_t rows = rows_address<kWidth>(memory);
  Place place{static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.z) * Config::kMaxRows, 0};
  place.rows = min(Config::kMaxRows, p.rows_per_head - place.first_row);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  const int total = total_blocks(p);
  Cursor cursor = cursor_at(p, part_begin(total, blockIdx.y, p.num_key_parts),
                            part_begin(total, blockIdx.y + 1, p.num_key_parts));
  if (!fits(p, total) || cursor.done()) return;

  const std::int8_t* const image = a.slice.rows + place.head * a.slice.row_bytes;
  for (int at = threadIdx.x * 16; at < a.slice.row_bytes; at += Config::kThreads * 16)
    copy_async_16(rows + at, image + at);
  for (int i = threadIdx.x; i < Config::kBuffers * Shared<kWidth>::kBufferVectors;
       i += Config::kThreads)
    shared.queries[0][i] = make_uint4(0, 0, 0, 0);
  for (int i = threadIdx.x; i < kWidth / 2; i += Config::kThreads)
    shared.zero_points[i] =
        reinterpret_cast<const uint2*>(a.slice.zero_points + place.head * kWidth)[i];
  if (threadIdx.x == 0)
    for (int i = 0; i < Config::kBuffers; ++i) {
      WarpBarrier(&shared.full[i]).init(Config::kTurningWarps);
      WarpBarrier(&shared.empty[i]).init(Config::kWarps);
    }
  // Of a step's tokens, a lane decodes this one and the sixteenth after it.
  const int offset = warp / 2 * kBlockTokens + warp % 2 * 8 + lane / 4;
  const TokenTurns<kWidth> token_turns(a, offset);
  int steps_done = 0;
  for (; !cursor.done(); cursor.advance(p, cursor.count(INT_MAX))) {
    __syncthreads();  // nobody needs the last sequence's queries any more
    load_queries<kWidth>(a, shared, cursor.seq, place);
    wait_for_copies();
    __syncthreads();
    run_segment<kWidth, Reader>(a, shared, rows, token_turns, place, cursor, offset, steps_done);
  }
}

}  // namespace commvq::cuda::key_scores
