#pragma once

#include "common/barrier.cuh"
#include "common/memory.cuh"
#include "common/mma.cuh"
#include "common/rope.cuh"
#include "decode_attention/code_reader.cuh"
#include "decode_attention/config.hpp"
#include "decode_attention/problem.cuh"
#include "decode_attention/value_sums.cuh"

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

/// What a thread block works on.
struct Place {
  int head;
  int first_row;  ///< of the head's
  int rows;
};

/// A sequence's blocks in one part. Kept in shared memory, since registers are scarce.
struct Segment {
  Place place;
  Cursor cursor;      ///< at the first block
  int count;          ///< blocks
  int num_steps;      ///< of kStepBlocks blocks
  int steps_before;   ///< of earlier segments
  int first_token;    ///< of the first block
  int last_position;  ///< of the sequence's queries
  int last_token;     ///< that has codes
  int seen_begin;     ///< every query sees the coded tokens from here ...
  int seen_end;       ///< ... to here

  __device__ Segment(const Problem& p, const Place& place_, const Cursor& cursor_,
                     int steps_before_)
      : place(place_), cursor(cursor_), steps_before(steps_before_) {
    const Sequence sequence(p, cursor.seq);
    count = cursor.count(INT_MAX);
    num_steps = (count + Config::kStepBlocks - 1) / Config::kStepBlocks;
    first_token = cursor.block * kBlockTokens;
    last_position = sequence.length - 1;
    last_token = sequence.coded_end(p, last_position) - 1;
    seen_begin = sequence.coded_begin(p, last_position);
    seen_end = sequence.coded_end(p, sequence.position(p, 0));
  }
};

/// What lies in shared memory before the rows. A tile of turned queries, for four rows, is
/// [width / 16][32 lanes] of 16 bytes, as mma fragments: columns 0 to 3 are the rows for tokens g
/// of a warp, 4 to 7 for tokens g + 16, so that both may be turned alike.
template <int kWidth>
struct Shared {
  static constexpr int kTileVectors = kWidth / 16 * 32;
  static constexpr int kBufferVectors = Config::kMaxRows / Config::kTileRows * kTileVectors;

  uint4 queries[Config::kBuffers][kBufferVectors];  ///< turned to the first token of a step
  float2 unit_queries[Config::kMaxRows][kWidth];    ///< times the pairs' units, brought to about 1
  float2 sixteen_turns[kWidth];                     ///< RoPE by 16 tokens
  uint2 zero_points[kWidth / 8 * 4];
  alignas(8) float factors[Config::kMaxRows];  ///< from sums of products to scores
  int lags[Config::kMaxRows];                  ///< how far a row's position is from the last one
  std::uint64_t full[Config::kBuffers];
  std::uint64_t empty[Config::kBuffers];
  Segment segment;
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

/// Turns the queries to the step's first token, `distance` before the last position, and to the
/// sixteenth after it, and lays them out as fragments: lane 4g + q of a tile holds column g, pairs
/// 8k + 2q and 8k + 2q + 1: real parts in b0, imaginary parts in b1. `thread` is one of
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
    float real[2][2], imag[2][2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int pair = 8 * k + 2 * q + e;
      const float2 query = shared.unit_queries[row][pair];
      const float2 turn =
          pair < a.slice.num_pairs ? rotation_of(row_distance, turns[pair]) : make_float2(1, 0);
      const float2 back = shared.sixteen_turns[pair];
      const float re = query.x * turn.x - query.y * turn.y;
      const float im = query.x * turn.y + query.y * turn.x;
      real[0][e] = re;
      imag[0][e] = im;
      real[1][e] = re * back.x + im * back.y;
      imag[1][e] = im * back.x - re * back.y;
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int column = 4 * t + row % Config::kTileRows;
      uint2* const target = reinterpret_cast<uint2*>(
          fragments + row / Config::kTileRows * Shared<kWidth>::kTileVectors + k / 2 * 32 +
          column * 4 + q);
      target[k % 2] = make_uint2(as_bits(__floats2half2_rn(real[t][0], real[t][1])),
                                 as_bits(__floats2half2_rn(imag[t][0], imag[t][1])));
    }
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

/// Cosines and sines of a thread's pairs for its first token of a step.
template <int kWidth>
struct TokenTurns {
  __half2 cosine[kWidth / 8];
  __half2 sine[kWidth / 8];

  /// `offset` is the token's place in the step.
  __device__ __forceinline__ TokenTurns(const KeySlice& slice, int offset) {
    const auto* const table = reinterpret_cast<const uint2*>(slice.token_turns);
#pragma unroll
    for (int k = 0; k < kWidth / 8; ++k) {
      const uint2 turn = table[(offset * (kWidth / 8) + k) * 4 + threadIdx.x % 4];
      cosine[k] = as_half2(turn.x);
      sine[k] = as_half2(turn.y);
    }
  }
};

/// Products of a warp's sixteen keys with the queries of a tile: the sums of rows become fp16 and
/// are turned, 16 channels at a time.
template <int kWidth>
__device__ __forceinline__ void multiply(const std::uint32_t (&sums)[2][kWidth / 8],
                                         const uint2* zero_points, const TokenTurns<kWidth>& turns,
                                         const uint4* queries, float (&scores)[4]) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int k = 0; k < kWidth / 8; ++k) {
    const uint2 zero = zero_points[k * 4 + q];
    std::uint32_t keys[4];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      // A byte under 0x64 is the fp16 number 1024 + byte.
      const __half2 real =
          __hsub2(as_half2(__byte_perm(sums[t][k], 0x64646464u, 0x4140)), as_half2(zero.x));
      const __half2 imag =
          __hsub2(as_half2(__byte_perm(sums[t][k], 0x64646464u, 0x4342)), as_half2(zero.y));
      const __half2 c = turns.cosine[k], s = turns.sine[k];
      keys[t] = as_bits(__hfma2(real, c, __hneg2(__hmul2(imag, s))));
      keys[2 + t] = as_bits(__hfma2(real, s, __hmul2(imag, c)));
    }
    const uint2 query = reinterpret_cast<const uint2*>(queries + k / 2 * 32)[k % 2];
    mma_16x8x16(scores, keys[0], keys[1], keys[2], keys[3], query.x, query.y);
  }
}

/// cap * tanh(score / cap).
__device__ __forceinline__ float capped(float score, float cap) {
  const float grown = exp2_approx(__fdividef(score, cap) * 2.88539008177792681f);
  return cap - __fdividef(2 * cap, 1 + grown);
}

/// A warp's sixteen tokens.
struct Half {
  int seq;
  int block;         ///< in the workspace
  int which;         ///< half of the block
  int token;         ///< a lane's first token, in the sequence
  bool wholly_seen;  ///< every query sees all of them
};

/// Row of a tile whose scores for tokens g and g + 16 lane 4g + q gathers: products leave it with
/// rows 2 (q % 2) and the next for one token.
__device__ __forceinline__ int tile_row() {
  const int q = threadIdx.x % 4;
  return q % 2 * 2 + q / 2;
}

/// Scores of a lane's two tokens and one row to weights and their sums in the workspace. `data` are
/// the tokens' `norm_and_scale`; value scales below 2^-100 count as zero. `call_row` is the row of
/// the call.
__device__ __forceinline__ void store_weights(const Problem& p, const Half& half,
                                              const std::uint32_t (&data)[2], float first,
                                              float second, int lag, int call_row, bool is_row) {
  const int g = threadIdx.x % 32 / 4;
  constexpr float kLeastLog = -100.0f;
  float first_log = __log2f(__uint_as_float(data[0] & 0xffff0000u));
  float second_log = __log2f(__uint_as_float(data[1] & 0xffff0000u));
  if (p.soft_cap > 0) {
    first = capped(first, p.soft_cap);
    second = capped(second, p.soft_cap);
  }
  if (!half.wholly_seen) {
    const Sequence sequence(p, half.seq);
    const int position = sequence.length - 1 - lag;
    const int begin = sequence.coded_begin(p, position), end = sequence.coded_end(p, position);
    // What was read of tokens that nobody sees may be anything.
    if (half.token < begin || half.token >= end) first = -INFINITY, first_log = 0;
    if (half.token + 16 < begin || half.token + 16 >= end) second = -INFINITY, second_log = 0;
  }
  float largest = fmaxf(first + fmaxf(first_log, kLeastLog), second + fmaxf(second_log, kLeastLog));
#pragma unroll
  for (int step = 4; step < 32; step *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  const float reference = fmaxf(largest, -1e30f);
  first -= reference;
  second -= reference;
  float sum = exp2_approx(first) + exp2_approx(second);
#pragma unroll
  for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (!is_row) return;
  // A scale that is NaN, of a token that could not be coded, shows.
  first += value_sums::log_factor(g);
  second += value_sums::log_factor(g);
  const float w0 = first_log < kLeastLog ? 0.0f : exp2_approx(first + first_log);
  const float w1 = second_log < kLeastLog ? 0.0f : exp2_approx(second + second_log);
  p.weights[(Index{half.block} * p.row_stride + call_row) * 16 + half.which * 8 + g] =
      as_bits(__floats2half2_rn(w0, w1));
  if (g == 0)
    p.block_sums[(Index{half.block} * kHalves + half.which) * p.row_stride + call_row] = {largest,
                                                                                          sum};
}

/// Adds what other slices found to the scores of a lane's two tokens.
__device__ __forceinline__ void add_slices(const Problem& p, Turn turn, const Half& half,
                                           int call_row, float& first, float& second) {
  float* const raw = p.raw_scores + (Index{half.block} * p.row_stride + call_row) * kBlockTokens +
                     half.which * 8 + threadIdx.x % 32 / 4;
  if (turn != Turn::kFirst) first += raw[0], second += raw[16];
  if (turn != Turn::kLast) raw[0] = first, raw[16] = second;
}

/// What a lane reads of its two tokens: codes, key norms and value scales.
template <class Reader>
struct TokenPair {
  Reader readers[2];
  std::uint16_t norms[2];
  std::uint16_t scales[2];

  /// True if blocks lie on one page and what is read beyond the last token does no harm.
  __device__ __forceinline__ static bool reads_whole_blocks(const Problem& p) {
    return Reader::kAnyBitsAreCodes && p.page.size >= kBlockTokens;
  }
  /// Of the tokens `place` and `place + 16` of the block that begins at `token`; `page_index` is
  /// its page where whole blocks are read. `last` is the last token that has codes.
  __device__ __forceinline__ void fetch(const Problem& p, const KeyCodes& codes, int page_index,
                                        int seq, int head, int token, int place, int last) {
    if (reads_whole_blocks(p)) {
      const std::uint8_t* const page = p.pages + page_index * p.page_stride;
      const int slot = (token & (p.page.size - 1)) + place;
      if constexpr (Reader::kAnyBitsAreCodes)
        Reader::fetch_two(codes, page, head * p.page.size + slot, readers);
      const std::uint8_t* const norm =
          page + (p.page.key_norms + head * p.page.norm_stride + 2 * slot);
      const std::uint8_t* const scale = page + (p.page.value_scales + 2 * slot);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        norms[t] = *reinterpret_cast<const std::uint16_t*>(norm + 32 * t);
        scales[t] = *reinterpret_cast<const std::uint16_t*>(scale + 32 * t);
      }
      return;
    }
    const std::int32_t* const table = p.block_table + Index{seq} * p.max_blocks;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int at = min(token + place + 16 * t, last);  // beyond it there may be no page
      const std::uint8_t* const page = p.pages + table[at >> p.page.shift] * p.page_stride;
      const int slot = at & (p.page.size - 1);
      readers[t].fetch(codes, page, head * p.page.size + slot);
      norms[t] = *reinterpret_cast<const std::uint16_t*>(
          page + (p.page.key_norms + head * p.page.norm_stride + 2 * slot));
      scales[t] = *reinterpret_cast<const std::uint16_t*>(page + (p.page.value_scales + 2 * slot));
    }
  }
  /// The key norm of a token (low half) and its value scale, both bf16.
  __device__ __forceinline__ std::uint32_t norm_and_scale(int t) const {
    return norms[t] | static_cast<std::uint32_t>(scales[t]) << 16;
  }
  /// Uses what was fetched with the same arguments: until then the loads may be under way.
  __device__ __forceinline__ void finish(const Problem& p, int head, int token, int place,
                                         int last) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int at = reads_whole_blocks(p) ? token + place : min(token + place + 16 * t, last);
      readers[t].finish(head * p.page.size + (at & (p.page.size - 1)));
    }
  }
};

/// Scores the blocks of `shared.segment`, step by step.
template <int kWidth, class Reader>
__device__ __forceinline__ void run_segment(const Arguments& a, Shared<kWidth>& shared,
                                            std::uint32_t rows,
                                            const TokenTurns<kWidth>& token_turns) {
  const Problem& p = a.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Segment& segment = shared.segment;
  constexpr int kStepTokens = Config::kStepBlocks * kBlockTokens;

  // First token of the warp's block in a step; of the last block where it has none.
  const auto token_of = [&](int step) {
    return segment.first_token +
           min(step * Config::kStepBlocks + warp / 2, segment.count - 1) * kBlockTokens;
  };
  // Queries are turned two steps ahead, codes read one step ahead and the block table two.
  TokenPair<Reader> tokens;
  int page_index = 0;
#pragma unroll 1
  for (int step = -2; step < segment.num_steps; ++step) {
    if (step + 2 < segment.num_steps) {
      const int number = segment.steps_before + step + 2;
      const int buffer = number % Config::kBuffers;
      if (warp / Config::kTurningWarps == number % (Config::kWarps / Config::kTurningWarps)) {
        const int round = number / Config::kBuffers;
        if (round > 0) WarpBarrier(&shared.empty[buffer]).wait((round - 1) % 2);
        turn_queries<kWidth>(a, shared, shared.queries[buffer],
                             segment.last_position - segment.first_token - (step + 2) * kStepTokens,
                             segment.place.rows, threadIdx.x % (Config::kTurningWarps * 32));
        WarpBarrier(&shared.full[buffer]).arrive();
      }
    }

    const int block = step * Config::kStepBlocks + warp / 2;
    const bool active = step >= 0 && block < segment.count;
    std::uint32_t sums[2][kWidth / 8];
    if (active) {
      tokens.finish(p, segment.place.head, token_of(step), warp % 2 * 8 + lane / 4,
                    segment.last_token);
      sum_rows<kWidth>(rows, tokens.readers, sums);
    }
    const std::uint32_t data[2] = {tokens.norm_and_scale(0), tokens.norm_and_scale(1)};
    if (step >= -1 && step + 1 < segment.num_steps)
      tokens.fetch(p, a.codes, page_index, segment.cursor.seq, segment.place.head,
                   token_of(step + 1), warp % 2 * 8 + lane / 4, segment.last_token);
    if (TokenPair<Reader>::reads_whole_blocks(p))
      page_index = p.block_table[Index{segment.cursor.seq} * p.max_blocks +
                                 (token_of(step + 2) >> p.page.shift)];
    if (step < 0) continue;

    const int number = segment.steps_before + step;
    const int buffer = number % Config::kBuffers;
    WarpBarrier(&shared.full[buffer]).wait(number / Config::kBuffers % 2);
    if (active) {
      const int token = segment.first_token + block * kBlockTokens;
      const Half half{segment.cursor.seq, segment.cursor.index + block, warp % 2,
                      token + warp % 2 * 8 + lane / 4,
                      token >= segment.seen_begin && token + kBlockTokens <= segment.seen_end};
#pragma unroll 1
      for (int tile = 0; tile * Config::kTileRows < segment.place.rows; ++tile) {
        float products[4] = {};
        multiply<kWidth>(sums, shared.zero_points, token_turns,
                         shared.queries[buffer] + tile * Shared<kWidth>::kTileVectors + lane,
                         products);
        // Two rows and one token of a lane against one row and both tokens.
        const bool is_second = lane % 4 >= 2;
        const float kept = is_second ? products[3] : products[0];
        const float other = __shfl_xor_sync(~0u, is_second ? products[2] : products[1], 2);
        const int row = tile * Config::kTileRows + tile_row();
        const bool is_row = row < segment.place.rows;
        const float factor = shared.factors[row];
        float first = (is_second ? other : kept) * (__uint_as_float(data[0] << 16) * factor);
        float second = (is_second ? kept : other) * (__uint_as_float(data[1] << 16) * factor);
        const int call_row = segment.place.head * p.rows_per_head + segment.place.first_row + row;
        if (a.turn != Turn::kOnly) {
          if (is_row) add_slices(p, a.turn, half, call_row, first, second);
          if (a.turn != Turn::kLast) continue;
        }
        store_weights(p, half, data, first, second, shared.lags[row], call_row, is_row);
      }
    }
    WarpBarrier(&shared.empty[buffer]).arrive();
  }
}

template <int kWidth, class Reader>
__device__ __forceinline__ void run(const Arguments& a, std::uint8_t* memory) {
  const Problem& p = a.problem;
  Shared<kWidth>& shared = *reinterpret_cast<Shared<kWidth>*>(memory);
  const std::uint32_t rows = rows_address<kWidth>(memory);
  const int part = blockIdx.x / p.num_kv_heads;
  Place place{static_cast<int>(blockIdx.x) % p.num_kv_heads,
              static_cast<int>(blockIdx.y) * Config::kMaxRows, 0};
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
  if (threadIdx.x < Config::kMaxRows) shared.factors[threadIdx.x] = 0, shared.lags[threadIdx.x] = 0;
  if (threadIdx.x < kWidth)
    shared.sixteen_turns[threadIdx.x] =
        static_cast<int>(threadIdx.x) < a.slice.num_pairs
            ? rotation_of(16, p.turns[a.slice.first_pair + threadIdx.x])
            : make_float2(1, 0);
  if (threadIdx.x == 0)
    for (int i = 0; i < Config::kBuffers; ++i) {
      WarpBarrier(&shared.full[i]).init(Config::kTurningWarps);
      WarpBarrier(&shared.empty[i]).init(Config::kWarps);
    }

  const int total = total_blocks(p);
  Cursor cursor = cursor_at(p, part_begin(total, part, p.num_key_parts),
                            part_begin(total, part + 1, p.num_key_parts));
  if (!fits(p, total)) cursor.stop = cursor.index;
  int steps_done = 0;
#pragma unroll 1
  while (!cursor.done()) {
    __syncthreads();  // nobody needs the last sequence's queries any more
    if (threadIdx.x == 0) shared.segment = Segment(p, place, cursor, steps_done);
    load_queries<kWidth>(a, shared, cursor.seq, place);
    wait_for_copies();
    __syncthreads();
    run_segment<kWidth, Reader>(a, shared, rows, token_turns);
    steps_done = shared.segment.steps_before + shared.segment.num_steps;
    cursor = shared.segment.cursor;
    cursor.advance(p, cursor.count(INT_MAX));
  }
  wait_for_copies();
}

}  // namespace commvq::cuda::key_scores
