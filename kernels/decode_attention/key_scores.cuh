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
  KeyCodes codes;
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
  alignas(8) float factors[Config::kMaxRows];  ///< from sums of products to scores
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
#pragma unroll 1
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

  /// `offset` is the first token's place in the step.
  __device__ TokenTurns(const KeySlice& slice, int offset) {
    const auto* const table = reinterpret_cast<const uint2*>(slice.token_turns);
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int k = 0; k < kWidth / 8; ++k) {
        const uint2 turn = table[((offset + 16 * t) * (kWidth / 8) + k) * 4 + threadIdx.x % 4];
        cosine[t][k] = as_half2(turn.x);
        sine[t][k] = as_half2(turn.y);
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

/// cap * tanh(score / cap).
__device__ __forceinline__ float capped(float score, float cap) {
  const float grown = exp2_approx(__fdividef(score, cap) * 2.88539008177792681f);
  return cap - __fdividef(2 * cap, 1 + grown);
}

/// A warp's sixteen tokens.
struct Half {
  int block;          ///< in the workspace
  int which;          ///< half of the block
  int token;          ///< a lane's first token, in the sequence
  bool wholly_seen;   ///< every query sees all of them
};

/// Scores of two tokens and rows 2q, 2q + 1 of a tile to weights and their sums in the workspace.
/// Value scales below 2^-100 count as zero. `logs` are log2 of the scales.
__device__ __forceinline__ void store_weights(const Problem& p, const Place& place,
                                              const Sequence& sequence, const Half& half,
                                              const float (&logs)[2], const int* lags,
                                              float (&scores)[4], int tile) {
  const int lane = threadIdx.x % 32;
  constexpr float kLeastLog = -100.0f;
  if (p.soft_cap > 0)
#pragma unroll
    for (float& score : scores) score = capped(score, p.soft_cap);
  if (!half.wholly_seen) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = min(tile * 8 + lane % 4 * 2 + i % 2, place.rows - 1);
      const int position = sequence.length - 1 - lags[row];
      const int token = half.token + i / 2 * 16;
      if (token < sequence.coded_begin(p, position) || token >= sequence.coded_end(p, position))
        scores[i] = -INFINITY;
    }
  }
  // Rows of the call before the tile's, and the lane's first row.
  const int call_row = place.head * p.rows_per_head + place.first_row + tile * 8 + lane % 4 * 2;
  const Index at = Index{half.block} * p.row_stride + call_row;
  std::uint32_t* const weights = p.weights + at * 16 + half.which * 8 + lane / 4;
  RowSum* const block_sums =
      p.block_sums + (Index{half.block} * kHalves + half.which) * p.row_stride + call_row;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float first = scores[i], second = scores[2 + i];
    float largest = fmaxf(first + fmaxf(logs[0], kLeastLog), second + fmaxf(logs[1], kLeastLog));
#pragma unroll
    for (int step = 4; step < 32; step *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    const float reference = fmaxf(largest, -1e30f);
    first -= reference;
    second -= reference;
    float sum = exp2_approx(first) + exp2_approx(second);
#pragma unroll
    for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (tile * 8 + lane % 4 * 2 + i >= place.rows) continue;
    // A scale that is NaN, of a token that could not be coded, shows.
    const float w0 = logs[0] < kLeastLog ? 0.0f : exp2_approx(first + logs[0]);
    const float w1 = logs[1] < kLeastLog ? 0.0f : exp2_approx(second + logs[1]);
    weights[i * 16] = as_bits(__floats2half2_rn(w0, w1));
    if (lane < 4) block_sums[i] = {largest, sum};
  }
}

/// Adds what other slices found to the scores of two tokens and rows 2q, 2q + 1 of a tile.
__device__ inline void add_slices(const Problem& p, Turn turn, const Place& place,
                                  const Half& half, int tile, float (&scores)[4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = tile * 8 + lane % 4 * 2 + i % 2;
    if (row >= place.rows) continue;
    const Index call_row = place.head * p.rows_per_head + place.first_row + row;
    float* const raw = p.raw_scores + (half.block * p.row_stride + call_row) * kBlockTokens +
                       half.which * 8 + lane / 4 + i / 2 * 16;
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

/// What a lane reads of its two tokens: codes, key norms and value scales.
template <class Reader>
struct TokenPair {
  Reader readers[2];
  NormAndScale norms_and_scales[2];

  /// Of tokens `token` and `token + 16`, but none after `last`, beyond which there may be no page.
  __device__ __forceinline__ void fetch(const Problem& p, const KeyCodes& codes,
                                        const std::int32_t* table, int head, int token, int last) {
    const std::uint8_t* page = nullptr;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int at = min(token + 16 * t, last);
      if (t == 0 || p.page.shift < 5) page = p.pages + table[at >> p.page.shift] * p.page_stride;
      const int slot = at & (p.page.size - 1);
      readers[t].fetch(codes, page, head * p.page.size + slot);
      const std::uint32_t norm = *reinterpret_cast<const std::uint16_t*>(
          page + (p.page.key_norms + head * p.page.norm_stride + 2 * slot));
      const std::uint32_t scale =
          *reinterpret_cast<const std::uint16_t*>(page + (p.page.value_scales + 2 * slot));
      norms_and_scales[t] = norm | scale << 16;
    }
  }
};

/// A sequence's blocks in one part, in steps of kStepBlocks. `steps_done` counts the steps of all
/// segments.
template <int kWidth, class Reader>
__device__ __forceinline__ void run_segment(const Arguments& a, Shared<kWidth>& shared,
                                            std::uint32_t rows,
                                            const TokenTurns<kWidth>& token_turns,
                                            const Place& place, const Cursor& cursor, int offset,
                                            int& steps_done) {
  const Problem& p = a.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int count = cursor.count(INT_MAX);
  const int num_steps = (count + Config::kStepBlocks - 1) / Config::kStepBlocks;
  const Sequence sequence(p, cursor.seq);
  const int first_position = sequence.position(p, 0), last_position = sequence.length - 1;
  const int last_token = sequence.coded_end(p, last_position) - 1;
  // Tokens that every query sees.
  const int seen_begin = sequence.coded_begin(p, last_position);
  const int seen_end = sequence.coded_end(p, first_position);
  const int first_token = cursor.block * kBlockTokens;
  constexpr int kStepTokens = Config::kStepBlocks * kBlockTokens;
  const std::int32_t* const table = p.block_table + Index{cursor.seq} * p.max_blocks;

  // Queries are turned two steps ahead, codes read one step ahead.
  TokenPair<Reader> next;
#pragma unroll 1
  for (int step = -2; step < num_steps; ++step) {
    const TokenPair<Reader> current = next;
    if (step >= -1 && step + 1 < num_steps)
      next.fetch(p, a.codes, table, place.head, first_token + (step + 1) * kStepTokens + offset,
                 last_token);
    if (step + 2 < num_steps) {
      const int number = steps_done + step + 2;
      const int buffer = number % Config::kBuffers;
      if (warp / Config::kTurningWarps == number % (Config::kWarps / Config::kTurningWarps)) {
        const int round = number / Config::kBuffers;
        if (round > 0) WarpBarrier(&shared.empty[buffer]).wait((round - 1) % 2);
        turn_queries<kWidth>(a, shared, shared.queries[buffer],
                             last_position - first_token - (step + 2) * kStepTokens, place.rows,
                             threadIdx.x % (Config::kTurningWarps * 32));
        WarpBarrier(&shared.full[buffer]).arrive();
      }
    }
    if (step < 0) continue;

    const int block = step * Config::kStepBlocks + warp / 2;
    const int number = steps_done + step;
    const int buffer = number % Config::kBuffers;
    const bool active = block < count;
    std::uint32_t keys[kWidth / 8][4];
    if (active) {
      std::uint32_t sums[2][kWidth / 8];
      sum_rows<kWidth>(rows, current.readers, sums);
      turn_keys<kWidth>(sums, shared.zero_points, token_turns, keys);
    }
    WarpBarrier(&shared.full[buffer]).wait(number / Config::kBuffers % 2);
    if (active) {
      const int block_token = first_token + block * kBlockTokens;
      const Half half{cursor.index + block, warp % 2, first_token + step * kStepTokens + offset,
                      block_token >= seen_begin && block_token + kBlockTokens <= seen_end};
      const NormAndScale(&data)[2] = current.norms_and_scales;
      const float logs[2] = {__log2f(scale_of(data[0])), __log2f(scale_of(data[1]))};
#pragma unroll 1
      for (int tile = 0; tile * 8 < place.rows; ++tile) {
        float scores[4] = {};
        multiply<kWidth>(keys, shared.queries[buffer] + tile * Shared<kWidth>::kTileVectors + lane,
                         scores);
        const float2 factors =
            *reinterpret_cast<const float2*>(&shared.factors[tile * 8 + lane % 4 * 2]);
        scores[0] *= norm_of(data[0]) * factors.x;
        scores[1] *= norm_of(data[0]) * factors.y;
        scores[2] *= norm_of(data[1]) * factors.x;
        scores[3] *= norm_of(data[1]) * factors.y;
        if (a.turn != Turn::kOnly) {
          add_slices(p, a.turn, place, half, tile, scores);
          if (a.turn != Turn::kLast) continue;
        }
        store_weights(p, place, sequence, half, logs, shared.lags, scores, tile);
      }
    }
    WarpBarrier(&shared.empty[buffer]).arrive();
  }
  steps_done += num_steps;
}

template <int kWidth, class Reader>
__device__ __forceinline__ void run(const Arguments& a, std::uint8_t* memory) {
  const Problem& p = a.problem;
  Shared<kWidth>& shared = *reinterpret_cast<Shared<kWidth>*>(memory);
  const std::uint32_t rows = rows_address<kWidth>(memory);
  Place place{static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.z) * Config::kMaxRows, 0};
  place.rows = min(Config::kMaxRows, p.rows_per_head - place.first_row);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  const std::int8_t* const image = a.slice.rows + place.head * a.slice.row_bytes;
#pragma unroll 4
  for (int at = threadIdx.x * 16; at < a.slice.row_bytes; at += Config::kThreads * 16)
    copy_async_16(rows + at, image + at);
  // Of a step's tokens, a lane decodes this one and the sixteenth after it.
  const int offset = warp / 2 * kBlockTokens + warp % 2 * 8 + lane / 4;
  const TokenTurns<kWidth> token_turns(a.slice, offset);
#pragma unroll 1
  for (int i = threadIdx.x; i < Config::kBuffers * Shared<kWidth>::kBufferVectors;
       i += Config::kThreads)
    shared.queries[0][i] = make_uint4(0, 0, 0, 0);
#pragma unroll 1
  for (int i = threadIdx.x; i < kWidth / 2; i += Config::kThreads)
    shared.zero_points[i] =
        reinterpret_cast<const uint2*>(a.slice.zero_points + place.head * kWidth)[i];
  if (threadIdx.x < Config::kMaxRows) shared.factors[threadIdx.x] = 0;
  if (threadIdx.x == 0)
    for (int i = 0; i < Config::kBuffers; ++i) {
      WarpBarrier(&shared.full[i]).init(Config::kTurningWarps);
      WarpBarrier(&shared.empty[i]).init(Config::kWarps);
    }

  const int total = total_blocks(p);
  Cursor cursor = cursor_at(p, part_begin(total, blockIdx.y, p.num_key_parts),
                            part_begin(total, blockIdx.y + 1, p.num_key_parts));
  if (!fits(p, total)) cursor.stop = cursor.index;
  int steps_done = 0;
#pragma unroll 1
  for (; !cursor.done(); cursor.advance(p, cursor.count(INT_MAX))) {
    __syncthreads();  // nobody needs the last sequence's queries any more
    load_queries<kWidth>(a, shared, cursor.seq, place);
    wait_for_copies();
    __syncthreads();
    run_segment<kWidth, Reader>(a, shared, rows, token_turns, place, cursor, offset, steps_done);
  }
  wait_for_copies();
}

}  // namespace commvq::cuda::key_scores
