#pragma once

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
namespace commvq::cuda::key_scores {

using Config = KeyScoresConfig;

/// How the slices of a head's pairs and books take turns at the same scores.
enum class Turn { kOnly, kFirst, kMiddle, kLast };

struct Arguments {
  Problem problem;
  KeySlice slice;
  Turn turn;
};

/// Shared memory behind the rows. Tile t of the turned queries is [width / 16][32 lanes] of 16 bytes,
/// as mma fragments.
template <int kWidth>
struct Shared {
  static constexpr int kTileVectors = kWidth / 16 * 32;
  static constexpr int kBuffer = Config::kMaxRows / 8 * kTileVectors;

  std::uint8_t* rows;
  uint4* queries;  ///< [2][tiles][kTileVectors], of this step and of the next
  float2* unit_queries;  ///< [kMaxRows][kWidth]: times the pairs' units, brought to about 1
  float* factors;        ///< [kMaxRows]: from sums of products to scores

  __device__ Shared(std::uint8_t* memory, Index row_bytes) : rows(memory) {
    queries = reinterpret_cast<uint4*>(memory + row_bytes);
    unit_queries = reinterpret_cast<float2*>(queries + 2 * kBuffer);
    factors = reinterpret_cast<float*>(unit_queries + Config::kMaxRows * kWidth);
  }
  static constexpr int kBytes = 2 * kBuffer * 16 + Config::kMaxRows * (kWidth * 8 + 4);
};

/// Reads the queries of a sequence: one warp a row.
template <int kWidth>
__device__ void load_queries(const Arguments& a, const Shared<kWidth>& shared, int seq, int head,
                             int first_row, int rows) {
  const Problem& p = a.problem;
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < rows; row += Config::kWarps) {
    const int query_token = (first_row + row) / p.group;
    const int q_head = head * p.group + (first_row + row) % p.group;
    const Index base =
        ((Index{seq} * p.num_query_tokens + query_token) * p.num_kv_heads * p.group + q_head) *
        p.head_dim;
    float2 query[kWidth / 32];
    float largest = 0;
    for (int i = 0; i < kWidth / 32; ++i) {
      const int pair = lane + 32 * i;
      query[i] = make_float2(0, 0);
      if (pair < a.slice.num_pairs) {
        const float unit = a.slice.units[head * kWidth + pair];
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
      shared.unit_queries[row * kWidth + lane + 32 * i] =
          make_float2(query[i].x * factor, query[i].y * factor);
    if (lane == 0) shared.factors[row] = p.score_scale / factor;
  }
}

/// Turns the queries to token `base` and lays them out as fragments: lane 4g + q of tile t holds
/// query 8t + g, pairs 8k + 2q and 8k + 2q + 1: real parts in b0, imaginary parts in b1.
template <int kWidth>
__device__ void turn_queries(const Arguments& a, const Shared<kWidth>& shared, uint4* fragments,
                             int length, int base, int first_row, int rows) {
  const Problem& p = a.problem;
  constexpr int kWords = kWidth / 8;
  for (int item = threadIdx.x; item < rows * kWords * 4; item += Config::kThreads) {
    const int q = item % 4;
    const int k = item / 4 % kWords;
    const int row = item / (4 * kWords);
    const int position = length - p.num_query_tokens + (first_row + row) / p.group;
    const Index distance = Index{position} - base;
    __half2 real, imag;
    float values[2][2];
    for (int e = 0; e < 2; ++e) {
      const int pair = 8 * k + 2 * q + e;
      const float2 query = shared.unit_queries[row * kWidth + pair];
      const float2 turn = pair < a.slice.num_pairs
                              ? rotation_of(distance, a.problem.turns[a.slice.first_pair + pair])
                              : make_float2(1, 0);
      values[0][e] = query.x * turn.x - query.y * turn.y;
      values[1][e] = query.x * turn.y + query.y * turn.x;
    }
    real = __floats2half2_rn(values[0][0], values[0][1]);
    imag = __floats2half2_rn(values[1][0], values[1][1]);
    uint2* const target = reinterpret_cast<uint2*>(
        fragments + row / 8 * Shared<kWidth>::kTileVectors + k / 2 * 32 + row % 8 * 4 + q);
    target[k % 2] = make_uint2(as_bits(real), as_bits(imag));
  }
}

/// One warp's sixteen tokens: lane 4g + q decodes tokens g and g + 16 of a half block with three
/// other lanes.
template <int kWidth, class Reader>
__device__ __forceinline__ void sum_rows(const std::uint8_t* rows, const Reader (&readers)[2],
                                         std::uint32_t (&sums)[2][kWidth / 8]) {
  const int lane = threadIdx.x % 32;
  const int q = lane % 4;
  const bool odd = lane / 4 % 2 != 0;
  constexpr std::uint32_t kBias = 0x80808080u;
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int i = 0; i < kWidth / 8; ++i) sums[t][i] = kBias;

  if constexpr (kWidth == 64) {
    // Odd tokens read the halves of a row in the other order: eight lanes then meet all 32 banks.
    const std::uint32_t part = q * 16 + (odd ? 64 : 0);
    Reader::for_each_book([&](auto book) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const std::uint32_t line = readers[t].line(book);
        const std::uint8_t* const base = rows + readers[t].book_offset(book);
        const uint4 x = *reinterpret_cast<const uint4*>(base + (line | part));
        const uint4 y = *reinterpret_cast<const uint4*>(base + (line | (part ^ 64)));
        sums[t][0] += x.x, sums[t][1] += x.y, sums[t][2] += x.z, sums[t][3] += x.w;
        sums[t][4] += y.x, sums[t][5] += y.y, sums[t][6] += y.z, sums[t][7] += y.w;
      }
    }, readers[0]);
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
    const std::uint32_t part = q * 16;
    Reader::for_each_pair([&](auto book) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const std::uint32_t even_line = readers[t].line(book);
        const std::uint32_t odd_line = readers[t].next_line(book) + 64;
        const std::uint8_t* const base = rows + readers[t].book_offset(book) / 2 + part;
        const uint4 x = *reinterpret_cast<const uint4*>(base + (odd ? odd_line : even_line));
        const uint4 y = *reinterpret_cast<const uint4*>(base + (odd ? even_line : odd_line));
        sums[t][0] += x.x + y.x, sums[t][1] += x.y + y.y;
        sums[t][2] += x.z + y.z, sums[t][3] += x.w + y.w;
      }
    }, readers[0]);
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
/// log2 of the scale; minus infinity for 0 (and below 2^-100).
__device__ __forceinline__ float log_scale(NormAndScale bits) {
  const float scale = __uint_as_float(bits & 0xffff0000u);
  // NaN stays NaN: what could not be coded shows.
  return scale < 0x1p-100f ? -INFINITY : __log2f(scale);
}

/// Scores of two tokens and rows 2q, 2q + 1 of a tile to weights and their sums in the workspace.
__device__ __forceinline__ void store_weights(const Problem& p, const Sequence& sequence,
                                              int first_token, const NormAndScale (&data)[2],
                                              const float (&scores)[4], Index block, int half,
                                              int head, int first_row, int rows, int tile) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = tile * 8 + lane % 4 * 2 + i;
    const int position = sequence.position(p, (first_row + row) / p.group);
    const int begin = sequence.coded_begin(p, position);
    const int end = sequence.coded_end(p, position);
    float score[2], scaled[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      float x = scores[2 * t + i];
      if (p.soft_cap > 0) x = p.soft_cap * tanhf(x / p.soft_cap);
      const int token = first_token + 16 * t;
      const bool visible = token >= begin && token < end;
      score[t] = visible ? x : -INFINITY;
      scaled[t] = score[t] + (visible ? log_scale(data[t]) : 0.0f);
    }
    float largest = fmaxf(scaled[0], scaled[1]);
    float largest_score = fmaxf(score[0], score[1]);
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
      largest_score = fmaxf(largest_score, __shfl_xor_sync(~0u, largest_score, step));
    }
    // Where every value is zero, any maximum will do.
    if (largest == -INFINITY) largest = largest_score;
    const float reference = largest == -INFINITY ? 0.0f : largest;
    float sum = exp2f(score[0] - reference) + exp2f(score[1] - reference);
#pragma unroll
    for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (row >= rows) continue;
    const Index call_row = Index{head} * p.rows_per_head + first_row + row;
    const __half2 weights =
        __floats2half2_rn(exp2f(scaled[0] - reference), exp2f(scaled[1] - reference));
    p.weights[(block * p.row_stride + call_row) * 16 + half * 8 + lane / 4] = as_bits(weights);
    if (lane < 4)
      p.block_sums[(block * kHalves + half) * p.row_stride + call_row] = {largest, sum};
  }
}

template <int kWidth, class Reader>
__device__ void run(const Arguments& a, std::uint8_t* memory) {
  const Problem& p = a.problem;
  const KeyPlane& plane = p.layout.planes[a.slice.plane];
  const Shared<kWidth> shared(memory, a.slice.row_bytes);
  const int head = blockIdx.x;
  const int first_row = blockIdx.z * Config::kMaxRows;
  const int rows = min(Config::kMaxRows, p.rows_per_head - first_row);
  const int tiles = (rows + 7) / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int half = warp % 2;
  const int offset = warp / 2 * kBlockTokens + half * 8 + lane / 4;  // of token 0 in a step

  const std::int8_t* const image = a.slice.rows + head * a.slice.row_bytes;
  for (Index at = threadIdx.x * 16; at < a.slice.row_bytes; at += Config::kThreads * 16)
    copy_async_16(shared.rows + at, image + at);
  for (int i = threadIdx.x; i < 2 * Shared<kWidth>::kBuffer; i += Config::kThreads)
    shared.queries[i] = make_uint4(0, 0, 0, 0);

  const Index total = total_blocks(p);
  if (!fits(p, total)) return;
  Cursor cursor = cursor_at(p, part_begin(total, blockIdx.y, p.num_key_parts),
                            part_begin(total, blockIdx.y + 1, p.num_key_parts));
  const TokenTurns<kWidth> token_turns(a, offset);
  const auto* const zero_points =
      reinterpret_cast<const uint2*>(a.slice.zero_points + head * kWidth);

  // What a lane reads of its two tokens, a step ahead of their use.
  Reader readers[2];
  NormAndScale fetched[2];
  const auto fetch = [&](const Cursor& at) {
    const Sequence sequence(p, at.seq);
    const int last = sequence.coded_end(p, sequence.length - 1) - 1;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      // Beyond the last token there may be no page.
      const int token = min(at.block * kBlockTokens + offset + 16 * t, last);
      const std::uint8_t* const page = page_of(p, at.seq, token);
      const int slot = token & (p.layout.page_size - 1);
      readers[t].fetch(p.layout, plane, page, head, slot);
      const std::uint32_t norm =
          *reinterpret_cast<const std::uint16_t*>(page + p.layout.key_norm(head, slot));
      const std::uint32_t scale =
          *reinterpret_cast<const std::uint16_t*>(page + p.layout.value_scale(slot));
      fetched[t] = norm | scale << 16;
    }
  };

  int buffer = 0;
  if (!cursor.done()) {
    load_queries<kWidth>(a, shared, cursor.seq, head, first_row, rows);
    fetch(cursor);
  }
  wait_for_copies();
  __syncthreads();
  if (!cursor.done())
    turn_queries<kWidth>(a, shared, shared.queries, p.seq_lens[cursor.seq],
                         cursor.block * kBlockTokens, first_row, rows);
  while (!cursor.done()) {
    __syncthreads();
    const int count = cursor.count(Config::kStepBlocks);
    Cursor next = cursor;
    next.advance(p, count);

    const Reader current[2] = {readers[0], readers[1]};
    const NormAndScale data[2] = {fetched[0], fetched[1]};
    if (!next.done()) {
      fetch(next);
      if (next.seq == cursor.seq)
        turn_queries<kWidth>(a, shared, shared.queries + (buffer ^ 1) * Shared<kWidth>::kBuffer, p.seq_lens[next.seq],
                             next.block * kBlockTokens, first_row, rows);
    }

    if (warp / 2 < count) {
      std::uint32_t keys[kWidth / 8][4];
      {
        std::uint32_t sums[2][kWidth / 8];
        sum_rows<kWidth>(shared.rows, current, sums);
        turn_keys<kWidth>(sums, zero_points, token_turns, keys);
      }
      const Sequence sequence(p, cursor.seq);
      const Index block = cursor.index + warp / 2;
      for (int tile = 0; tile < tiles; ++tile) {
        float scores[4] = {};
        const uint4* const queries =
            shared.queries + buffer * Shared<kWidth>::kBuffer + tile * Shared<kWidth>::kTileVectors + lane;
#pragma unroll
        for (int k = 0; k < kWidth / 8; k += 2) {
          const uint4 q = queries[k / 2 * 32];
          mma_16x8x16(scores, keys[k][0], keys[k][1], keys[k][2], keys[k][3], q.x, q.y);
          mma_16x8x16(scores, keys[k + 1][0], keys[k + 1][1], keys[k + 1][2], keys[k + 1][3], q.z,
                      q.w);
        }
        const int row = tile * 8 + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          scores[i] *= norm_of(data[i / 2]) * shared.factors[min(row + i % 2, rows - 1)];
        if (a.turn != Turn::kOnly) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (row + i % 2 >= rows) continue;
            const Index call_row = Index{head} * p.rows_per_head + first_row + row + i % 2;
            float* const raw = p.raw_scores + (block * p.row_stride + call_row) * kBlockTokens +
                               half * 8 + lane / 4 + i / 2 * 16;
            if (a.turn != Turn::kFirst) scores[i] += *raw;
            if (a.turn != Turn::kLast) *raw = scores[i];
          }
          if (a.turn != Turn::kLast) continue;
        }
        store_weights(p, sequence, cursor.block * kBlockTokens + offset, data, scores, block, half, head, first_row, rows, tile);
      }
    }

    if (!next.done() && next.seq != cursor.seq) {
      __syncthreads();
      load_queries<kWidth>(a, shared, next.seq, head, first_row, rows);
      __syncthreads();
      turn_queries<kWidth>(a, shared, shared.queries + (buffer ^ 1) * Shared<kWidth>::kBuffer, p.seq_lens[next.seq],
                           next.block * kBlockTokens, first_row, rows);
    }
    cursor = next;
    buffer ^= 1;
  }
}

}  // namespace commvq::cuda::key_scores
