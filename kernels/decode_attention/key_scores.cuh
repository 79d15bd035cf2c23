#pragma once

#include "common/barrier.cuh"
#include "common/launch.cuh"
#include "common/memory.cuh"
#include "common/mma.cuh"
#include "common/rope.cuh"
#include "decode_attention/byte_rows.cuh"
#include "decode_attention/code_reader.cuh"
#include "decode_attention/config.hpp"
#include "decode_attention/narrow_rows.cuh"
#include "decode_attention/pair_keys.cuh"
#include "decode_attention/problem.cuh"
#include "decode_attention/scores.cuh"
#include "decode_attention/value_sums.cuh"

/// Scores of coded keys. A thread block keeps the rows of some books of one head in shared memory
/// as integers of 8 or 4 bits, and decodes every token once for all query heads that read it:
///
///   1. four threads of a warp add up a token's rows: of 8 bits as four sums to a 32-bit word, of 4
///      bits by the tensor units;
///   2. the sums become fp16 and are turned by the place of the warp's block within the step
///      (constants in registers), since turning commutes with adding rows;
///   3. they are operands of a matrix product with the queries, which were turned to the first
///      token of the step and to some tokens after it;
///   4. scores become weights relative to the maximum of the block, with the scale of the token's
///      value included, which is all that adding up values needs.
///
/// Warps do not wait for each other but for the turned queries, which a few of them make a step
/// ahead: what one of them waits for, of shared memory or of the units for products, others hide.
namespace commvq::cuda::key_scores {

using Config = KeyScoresConfig;

static_assert(Config::kStepTokens <= KeySlice::kTurnTokens,
              "every place within a step needs its turn of RoPE");

/// How the slices of a head's pairs and books take turns at the same scores.
enum class Turn { kOnly, kFirst, kMiddle, kLast };

struct Arguments {
  Problem problem;
  KeySlice slice;
  Turn turn;
  KeyCodes codes[4];  ///< of the slice's planes
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
  int seq;
  int index;          ///< of the first block in the workspace
  int count;          ///< blocks
  int num_steps;      ///< of kStepBlocks blocks
  int steps_before;   ///< of earlier segments
  int first_token;    ///< of the first block
  int last_position;  ///< of the sequence's queries
  int last_token;     ///< that has codes
  int seen_begin;     ///< every query sees the coded tokens from here ...
  int seen_end;       ///< ... to here

  __device__ Segment(const Problem& p, const Place& place_, const Cursor& cursor, int steps_before_)
      : place(place_), seq(cursor.seq), index(cursor.index), steps_before(steps_before_) {
    const Sequence sequence(p, seq);
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
/// [2 halves][width / 16][32 lanes] of 16 bytes, as mma fragments: in half h columns 0 to 3 are the
/// rows for tokens g + 8 h of a block, 4 to 7 for tokens g + 8 h + 16, so that all of a lane's keys
/// may be turned alike.
template <int kWidth>
struct Shared {
  static constexpr int kHalfVectors = kWidth / 16 * 32;
  static constexpr int kTileVectors = 2 * kHalfVectors;
  static constexpr int kBufferVectors = Config::kTiles * kTileVectors;

  uint4 queries[Config::kBuffers][kBufferVectors];  ///< turned to the first token of a step
  float2 unit_queries[Config::kMaxRows][kWidth];    ///< times the pairs' units, brought to about 1
  float2 eight_turns[kWidth];                       ///< RoPE by 8 tokens
  uint2 zero_points[kWidth / 8 * 4];
  alignas(8) float factors[Config::kMaxRows];  ///< from sums of products to scores
  StageCodesPlace code_places[4];
  RowPlaces row_places[32];
  LineWeights line_weights;
  int lags[Config::kMaxRows];  ///< how far a row's position is from the last one
  std::uint64_t full[Config::kBuffers];
  std::uint64_t empty[Config::kBuffers];
  alignas(16) Place place;
  Segment segment;
  /// At the next segment. Aligned, so that no vector that others read of the segment has it in it,
  /// which a thread may be moving.
  alignas(16) Cursor cursor;
  int num_steps;  ///< before it
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
      shared.factors[row] = p.score_scale / factor * (a.slice.row_bits == 4 ? 512.0f : 1.0f);
      shared.lags[row] = p.num_query_tokens - 1 - query_token;
    }
  }
}

/// Turns the queries to the step's first token, `distance` before the last position, and to the
/// tokens 8, 16 and 24 after it, and lays them out as fragments: lane 4g + q of a half holds column
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
      back[e] = shared.eight_turns[pair];
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

/// Products of sixteen of a warp's keys with the queries, [tile][lane's elements].
template <int kTiles>
using Products = float[kTiles][4];

/// Turns pairs 8k and on of the keys and adds their products with the queries of kUsed tiles for a
/// half of a step, whose fragments begin at `queries`.
template <int kTiles, int kUsed, int kWidth>
__device__ __forceinline__ void multiply(const PairKeys& keys, int k,
                                         const TokenTurns<kWidth>& turns, const uint4* queries,
                                         Products<kTiles>& products) {
  const __half2 c = turns.cosine[k], s = turns.sine[k];
  std::uint32_t turned[4];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    turned[t] = as_bits(__hfma2(keys.real[t], c, __hneg2(__hmul2(keys.imag[t], s))));
    turned[2 + t] = as_bits(__hfma2(keys.real[t], s, __hmul2(keys.imag[t], c)));
  }
#pragma unroll
  for (int tile = 0; tile < kUsed; ++tile) {
    const uint4* const fragments =
        queries + tile * Shared<kWidth>::kTileVectors + k / 2 * 32 + threadIdx.x % 32;
    const uint2 query = reinterpret_cast<const uint2*>(fragments)[k % 2];
    mma_16x8x16(products[tile], turned[0], turned[1], turned[2], turned[3], query.x, query.y);
  }
}

/// What stands for zero, of a lane's pairs 8k + 2q and the next.
template <int kWidth>
__device__ __forceinline__ uint2 zero_of(const Shared<kWidth>& shared, int k) {
  return shared.zero_points[k * 4 + threadIdx.x % 4];
}

/// The same of all pairs, from sums of rows of 8 bits.
template <int kTiles, int kWidth>
__device__ __forceinline__ void multiply_sums(const ByteRowSums<kWidth>& sums,
                                              const Shared<kWidth>& shared,
                                              const TokenTurns<kWidth>& turns, const uint4* queries,
                                              Products<kTiles>& products) {
#pragma unroll
  for (int k = 0; k < kWidth / 8; ++k)
    multiply<kTiles, kTiles>(sums.keys(k, zero_of(shared, k)), k, turns, queries, products);
}

/// The same from rows of 4 bits, sixteen pairs at a time; with kReadAhead the next ones' first rows
/// are read before these pairs are multiplied.
template <bool kReadAhead, int kTiles, int kGroups>
__device__ __forceinline__ void multiply_rows(const NarrowRows<kGroups>& rows,
                                              const Shared<64>& shared, const TokenTurns<64>& turns,
                                              const uint4* queries, int num_rows,
                                              Products<kTiles>& products) {
  const LaneWeights weights(shared.line_weights);
  uint4 firsts[2];
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    PairKeys keys[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      if (part == 0 || !kReadAhead) firsts[t] = rows.first(t, 16 * part);
      const NarrowSums sums = rows.sums(weights, t, 16 * part, firsts[t]);
      if (kReadAhead && part < 3) firsts[t] = rows.first(t, 16 * (part + 1));
#pragma unroll
      for (int i = 0; i < 2; ++i)
        sums.get(i, zero_of(shared, 2 * part + i), keys[i].real[t], keys[i].imag[t]);
    }
    // Without a branch the compiler begins the next part's sums too early, and spills.
    const auto multiply_part = [&](auto multiply_pairs) {
      for (int i = 0; i < 2; ++i) multiply_pairs(keys[i], 2 * part + i, turns, queries, products);
    };
    if (num_rows <= Config::kTileRows) {
      multiply_part(multiply<kTiles, 1, 64>);
    } else {
      multiply_part(multiply<kTiles, kTiles, 64>);
    }
  }
}

/// A warp's block of tokens.
struct Block {
  int seq;
  int index;         ///< in the workspace
  int token;         ///< a lane's first token, in the sequence; the others are 8, 16 and 24 later
  bool wholly_seen;  ///< every query sees all of them
};

/// Row of a tile whose scores lane 4g + q gathers: products leave it with rows 2 (q % 2) and the
/// next for one token.
__device__ __forceinline__ int tile_row() {
  const int q = threadIdx.x % 4;
  return q % 2 * 2 + q / 2;
}

/// Scores of a lane's tokens for one row to weights and their sum in the workspace. `scales` are
/// the tokens' value scales, of which those below 2^-100 bound no weight; `call_row` is the row of
/// the call.
__device__ __forceinline__ void store_weights(const Problem& p, const Block& block,
                                              float (&scores)[4], float (&scales)[4], int lag,
                                              int call_row, bool is_row) {
  const int g = threadIdx.x % 32 / 4;
  if (p.soft_cap > 0)
#pragma unroll
    for (float& score : scores) score = capped(score, p.soft_cap);
  if (!block.wholly_seen) hide_unseen<8>(p, block.seq, block.token, lag, scores, scales);
  float largest = -INFINITY;
#pragma unroll
  for (int t = 0; t < 4; ++t)
    largest = fmaxf(largest, scores[t] + log2_approx(fmaxf(scales[t], kLeastScale)));
#pragma unroll
  for (int step = 4; step < 32; step *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  const float reference = fmaxf(largest, -1e30f);
  float sum = 0;
  const float factor = value_sums::weight_factor(g);
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    scores[t] = exp2_approx(scores[t] - reference);
    sum += scores[t];
    // A scale that is NaN, of a token that could not be coded, shows.
    scores[t] *= scales[t] * factor;
  }
#pragma unroll
  for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (!is_row) return;
  std::uint32_t* const weights =
      p.weights + (Index{block.index} * p.row_stride + call_row) * 16 + g;
  weights[0] = as_bits(__floats2half2_rn(scores[0], scores[2]));
  weights[8] = as_bits(__floats2half2_rn(scores[1], scores[3]));
  if (g == 0) p.block_sums[Index{block.index} * p.row_stride + call_row] = {largest, sum};
}

/// Adds what other slices found to the scores of a lane's tokens.
__device__ __forceinline__ void add_slices(const Problem& p, Turn turn, const Block& block,
                                           int call_row, float (&scores)[4]) {
  float* const raw = p.raw_scores + (Index{block.index} * p.row_stride + call_row) * kBlockTokens +
                     threadIdx.x % 32 / 4;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    if (turn != Turn::kFirst) scores[t] += raw[8 * t];
    if (turn != Turn::kLast) raw[8 * t] = scores[t];
  }
}

/// Where a lane's tokens of a block lie: four of them, eight apart.
template <class Reader, bool kKeepsPage>
struct LaneTokens {
  const std::int32_t* table;   ///< of the sequence
  int first;                   ///< token
  int last;                    ///< token of the sequence that has codes
  const std::uint8_t* page{};  ///< of all tokens, if they are on one and it is kept

  __device__ __forceinline__ LaneTokens(const Problem& p, int seq, int block_token, int last_)
      : table(p.block_table + Index{seq} * p.max_blocks),
        first(block_token + static_cast<int>(threadIdx.x) % 32 / 4),
        last(last_) {
    if (kKeepsPage && are_on_one_page(p)) page = page_of(p, first);
  }

  /// True if blocks lie on one page and what is read beyond the last token does no harm.
  __device__ __forceinline__ static bool are_on_one_page(const Problem& p) {
    return Reader::kAnyBitsAreCodes && p.page.size >= kBlockTokens;
  }
  __device__ __forceinline__ int token(const Problem& p, int t) const {
    // Beyond the last token there may be no page.
    return are_on_one_page(p) ? first + 8 * t : min(first + 8 * t, last);
  }
  __device__ __forceinline__ const std::uint8_t* page_of(const Problem& p, int token) const {
    return p.pages + table[token >> p.page.shift] * p.page_stride;
  }
  __device__ __forceinline__ const std::uint8_t* only_page(const Problem& p) const {
    return kKeepsPage ? page : page_of(p, first);
  }
  __device__ __forceinline__ static int slot_of(const Problem& p, int token) {
    return token & (p.page.size - 1);
  }

  /// Starts reading the codes of head `head` of tokens `half` and `half` + 2 of the four.
  __device__ __forceinline__ void fetch_codes(const Problem& p, const KeyCodes& codes, int head,
                                              int half, AnyCodes (&readers)[2]) const {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int at = token(p, half + 2 * t);
      readers[t].fetch(codes, page_of(p, at), head * p.page.size + slot_of(p, at));
    }
  }
  template <int kGroups>
  __device__ __forceinline__ void fetch_codes(const Problem& p, const StageCodesPlace& place, int,
                                              int half, StageCodes<kGroups> (&readers)[2]) const {
    if (are_on_one_page(p)) {
      const int slot = slot_of(p, first) + 8 * half;
      const std::uint8_t* const words = place.words_of(only_page(p), slot);
      const std::uint8_t* const tail = place.tail_of(only_page(p), slot);
      readers[0].fetch(words, tail);
      readers[1].fetch(words + 16 * 4 * place.num_words, tail + 16 / 8 * place.tail_bits);
      return;
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int at = token(p, half + 2 * t);
      readers[t].fetch(place.words_of(page_of(p, at), slot_of(p, at)),
                       place.tail_of(page_of(p, at), slot_of(p, at)));
    }
  }

  /// The tokens' key norms and value scales, all bf16.
  __device__ __forceinline__ void fetch_scales(const Problem& p, int head,
                                               std::uint16_t (&norms)[4],
                                               std::uint16_t (&scales)[4]) const {
    const int norms_at = p.page.key_norms + head * p.page.norm_stride;
    const auto fetch = [&](int t, const std::uint8_t* from, int slot) {
      norms[t] = *reinterpret_cast<const std::uint16_t*>(from + (norms_at + 2 * slot));
      scales[t] = *reinterpret_cast<const std::uint16_t*>(from + (p.page.value_scales + 2 * slot));
    };
    if (are_on_one_page(p)) {
      const std::uint8_t* const from = only_page(p) + 2 * slot_of(p, first);
#pragma unroll
      for (int t = 0; t < 4; ++t) fetch(t, from, 8 * t);
      return;
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) fetch(t, page_of(p, token(p, t)), slot_of(p, token(p, t)));
  }
};

/// Products of a lane's row with its tokens, [tile][token].
template <int kTiles>
using LaneProducts = float[kTiles][4];

/// Those of tokens `half` and `half` + 2 from the products of a half, of which a lane has two rows
/// of one token.
template <int kTiles>
__device__ __forceinline__ void gather(const Products<kTiles>& products, int half,
                                       LaneProducts<kTiles>& gathered) {
  const bool is_second = threadIdx.x % 4 >= 2;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const float(&of)[4] = products[tile];
    const float kept = is_second ? of[3] : of[0];
    const float other = __shfl_xor_sync(~0u, is_second ? of[2] : of[1], 2);
    gathered[tile][half] = is_second ? other : kept;
    gathered[tile][half + 2] = is_second ? kept : other;
  }
}

/// Products of a block to weights or, with other slices to come, raw scores.
template <int kTiles>
__device__ __forceinline__ void score_block(const Arguments& a, const Block& block,
                                            const LaneProducts<kTiles>& products,
                                            const std::uint16_t (&norms)[4],
                                            const std::uint16_t (&scales)[4], const float* factors,
                                            const int* lags, const Place& place) {
  const Problem& p = a.problem;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile * Config::kTileRows >= place.rows) break;
    const int row = tile * Config::kTileRows + tile_row();
    const bool is_row = row < place.rows;
    const int call_row = place.head * p.rows_per_head + place.first_row + row;
    float scores[4];
#pragma unroll
    for (int t = 0; t < 4; ++t)
      scores[t] = products[tile][t] * (bf16_to_float(norms[t]) * factors[row]);
    if (a.turn != Turn::kOnly) {
      if (is_row) add_slices(p, a.turn, block, call_row, scores);
      if (a.turn != Turn::kLast) continue;
    }
    float row_scales[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) row_scales[t] = bf16_to_float(scales[t]);
    store_weights(p, block, scores, row_scales, lags[row], call_row, is_row);
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

/// Scores the blocks of `shared.segment`, step by step.
template <int kWidth, class Reader, int kTiles>
__device__ __forceinline__ void run_segment(const Arguments& a, Shared<kWidth>& shared,
                                            std::uint32_t rows,
                                            const TokenTurns<kWidth>& token_turns) {
  constexpr bool kRegistersAreLeft = kTiles <= Reader::kTilesWithRegisters;
  using Tokens = LaneTokens<Reader, kRegistersAreLeft>;
  const Problem& p = a.problem;
  const int warp = threadIdx.x / 32;
  const Segment& segment = shared.segment;

  // The warp's block in a step; the last block where it has none.
  const auto tokens_of = [&](int step) {
    const int block = min(step * Config::kStepBlocks + warp, segment.count - 1);
    return Tokens(p, segment.seq, segment.first_token + block * kBlockTokens, segment.last_token);
  };
  const auto& codes = [&]() -> const auto& {
    if constexpr (Reader::kRowBits == 8) {
      return a.codes[0];
    } else {
      return shared.code_places[threadIdx.x % 4];
    }
  }
  ();
  // Queries are turned a step ahead; codes are read while others' rows are added up.
  Reader readers[2];
  turn_if_due(a, shared, 0);
  Tokens tokens = tokens_of(0), next = tokens;
  tokens.fetch_codes(p, codes, segment.place.head, 0, readers);
#pragma unroll 1
  for (int step = 0; step < segment.num_steps; ++step) {
    const bool last_step = step + 1 == segment.num_steps;
    if (!last_step) turn_if_due(a, shared, step + 1);

    const int number = segment.steps_before + step;
    const int buffer = number % Config::kBuffers;
    const Barrier full(&shared.full[buffer]), empty(&shared.empty[buffer]);
    if (step * Config::kStepBlocks + warp >= segment.count) {
      full.wait(number / Config::kBuffers % 2);
      empty.arrive();
      break;
    }
    LaneProducts<kTiles> gathered;
    std::uint16_t norms[4], scales[4];
#pragma unroll(kRegistersAreLeft ? 2 : 1)
    for (int half = 0; half < 2; ++half) {
      const uint4* const queries = shared.queries[buffer] + half * Shared<kWidth>::kHalfVectors;
      const auto fetch_next = [&] {
        if (half == 0) {
          tokens.fetch_codes(p, codes, segment.place.head, 1, readers);
        } else if (!last_step) {
          next = tokens_of(step + 1);
          next.fetch_codes(p, codes, segment.place.head, 0, readers);
        }
      };
      Products<kTiles> products = {};
      const auto wait_for_queries = [&] {
        if (half == 0) full.wait(number / Config::kBuffers % 2);
      };
      if constexpr (Reader::kRowBits == 8) {
        const ByteRowSums<kWidth> sums(rows, readers[0], readers[1]);
        fetch_next();
        wait_for_queries();
        multiply_sums<kTiles>(sums, shared, token_turns, queries, products);
      } else {
        for (Reader& reader : readers) reader.finish(codes, static_cast<int>(threadIdx.x) % 32 / 4);
        const NarrowRows narrow_rows(shared.row_places[threadIdx.x % 32], readers);
        fetch_next();
        wait_for_queries();
        multiply_rows<kRegistersAreLeft, kTiles>(narrow_rows, shared, token_turns, queries,
                                                 segment.place.rows, products);
      }
      if (half == 1) tokens.fetch_scales(p, segment.place.head, norms, scales);
      if (half == 0) {
        gather<kTiles>(products, 0, gathered);
      } else {
        gather<kTiles>(products, 1, gathered);
      }
    }
    empty.arrive();

    const Block block{
        segment.seq, segment.index + step * Config::kStepBlocks + warp, tokens.first,
        tokens.first >= segment.seen_begin && tokens.first + kBlockTokens <= segment.seen_end};
    score_block<kTiles>(a, block, gathered, norms, scales, shared.factors, shared.lags,
                        segment.place);
    tokens = next;
  }
}

/// What depends on the codebooks alone comes before the previous kernel of the stream has ended.
template <int kWidth, class Reader, int kTiles>
__device__ __forceinline__ void run(const Arguments& a, std::uint8_t* memory) {
  const Problem& p = a.problem;
  Shared<kWidth>& shared = *reinterpret_cast<Shared<kWidth>*>(memory);
  const std::uint32_t rows = rows_address<kWidth>(memory);
  const int head = static_cast<int>(blockIdx.x) % p.num_kv_heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  const int row_bytes = static_cast<int>(a.slice.row_bytes);
  const std::int8_t* const image = a.slice.rows + Index{head} * row_bytes;
#pragma unroll 4
  for (int at = static_cast<int>(threadIdx.x) * 16; at < row_bytes; at += Config::kThreads * 16)
    copy_async_16(rows + at, image + at);
  const TokenTurns<kWidth> token_turns(a.slice, warp * kBlockTokens + lane / 4);
#pragma unroll 1
  for (int i = threadIdx.x; i < Config::kBuffers * Shared<kWidth>::kBufferVectors;
       i += Config::kThreads)
    shared.queries[0][i] = make_uint4(0, 0, 0, 0);
#pragma unroll 1
  for (int i = threadIdx.x; i < kWidth / 2; i += Config::kThreads)
    shared.zero_points[i] = reinterpret_cast<const uint2*>(a.slice.zero_points + head * kWidth)[i];
  if (Reader::kRowBits == 4 && threadIdx.x < 32) {
    if (threadIdx.x < 4)
      shared.code_places[threadIdx.x] = StageCodesPlace(a.codes[threadIdx.x], head, p.page.size);
    shared.row_places[threadIdx.x] = RowPlaces(static_cast<int>(threadIdx.x), rows);
    for (int j = 0; j < 3; ++j)
      shared.line_weights[j][threadIdx.x] = line_weight(
          a.slice.line_weights + head * KeySlice::kNarrowWeights, j, static_cast<int>(threadIdx.x));
  }
  if (threadIdx.x < Config::kMaxRows) shared.factors[threadIdx.x] = 0, shared.lags[threadIdx.x] = 0;
  if (threadIdx.x < kWidth)
    shared.eight_turns[threadIdx.x] =
        static_cast<int>(threadIdx.x) < a.slice.num_pairs
            ? rotation_of(8, p.turns[a.slice.first_pair + threadIdx.x])
            : make_float2(1, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kBuffers; ++i) {
      Barrier(&shared.full[i]).init(32 * Config::kTurningWarps);
      Barrier(&shared.empty[i]).init(32 * Config::kWarps);
    }
    const int first_row = static_cast<int>(blockIdx.y) * Config::kMaxRows;
    shared.num_steps = 0;
    shared.place = {head, first_row, min(Config::kMaxRows, p.rows_per_head - first_row)};
  }

  wait_for_previous_kernel();
  if (warp == 0) {
    const int part = static_cast<int>(blockIdx.x) / p.num_kv_heads;
    const Cursor cursor = part_cursor(p, total_blocks(p), part, p.num_key_parts);
    if (lane == 0) shared.cursor = cursor;
  }
  __syncthreads();
#pragma unroll 1
  while (!shared.cursor.done()) {
    if (threadIdx.x == 0)
      shared.segment = Segment(p, shared.place, shared.cursor, shared.num_steps);
    load_queries<kWidth>(a, shared, shared.cursor.seq, shared.place);
    wait_for_copies();
    __syncthreads();
    run_segment<kWidth, Reader, kTiles>(a, shared, rows, token_turns);
    if (threadIdx.x == 0) {
      shared.num_steps += shared.segment.num_steps;
      shared.cursor.advance(p, shared.segment.count);
    }
    __syncthreads();  // nobody needs the last sequence's queries any more
  }
  wait_for_copies();
  // The exact tokens take the memory next.
  if (threadIdx.x == 0)
    for (int i = 0; i < Config::kBuffers; ++i) {
      Barrier(&shared.full[i]).end();
      Barrier(&shared.empty[i]).end();
    }
}

}  // namespace commvq::cuda::key_scores
