#pragma once

#include "common/barrier.cuh"
#include "common/memory.cuh"
#include "common/mma.cuh"
#include "common/rope.cuh"
#include "decode_attention/code_reader.cuh"
#include "decode_attention/config.hpp"
#include "decode_attention/problem.cuh"

/// Attention over binary codes that no two KV heads share: keys by books of two rows, which is a
/// linear code k = norm * (k_0 + sum over bits b_i e_i), and values with a block a head. Nothing is
/// looked up: code bits are operands of matrix products as they lie in memory.
///
/// A mask leaves bit s of either half of a 32-bit word: as fp16 numbers these are b * 2^(s - 24).
/// A warp takes a block of 32 tokens at a time, for four rows (query heads):
///
///   1. pairs that turn fast are decoded, bits times e, turned by the token's place in its tile of
///      256 tokens, and multiplied with the queries, turned to the tile's first token;
///   2. over a tile the other pairs turn so little that their score is a cubic in the token's
///      place: bits times e^T q for queries turned to four places, the nodes, and Lagrange's
///      polynomials between them. So these pairs are never decoded;
///   3. scores become weights relative to the largest score so far, whose sums with the bits of the
///      values are gathered.
namespace commvq::cuda::binary_attention {

using Config = BinaryAttentionConfig;

constexpr int kTileWarps = Config::kTileWarps;
constexpr int kTiles = Config::kWarps / kTileWarps;              ///< of a step
constexpr int kTileBlocks = Config::kTileTokens / kBlockTokens;
constexpr int kRounds = kTileBlocks / kTileWarps;                ///< blocks of a tile that a warp takes
constexpr int kStepBlocks = kTiles * kTileBlocks;
constexpr int kNodes = BinaryKeys::kNodes;
constexpr int kRows = Config::kRows;

struct Arguments {
  Problem problem;
  BinaryKeys keys;
  KeyCodes codes;
};

/// Sizes that follow from the pairs that are decoded, in eights, and the words of key codes that a
/// lane holds of a token.
template <int kHighEights_, int kLaneWords_>
struct Shape {
  static constexpr int kLaneWords = kLaneWords_;
  static constexpr int kHighEights = kHighEights_;
  static constexpr int kLowEights = BinaryKeys::kPairs / 8 - kHighEights;
  static constexpr int kSteps = 8 * kLaneWords;       ///< of sixteen key codes
  static constexpr int kCodeTiles = 8 * kLaneWords;   ///< likewise, as rows of e^T q
  static constexpr int kValueBits = 128 * kLaneWords; ///< of a head
  static constexpr int kValueTiles = kValueBits / 16;
};

/// Some blocks of one sequence, and what its queries see. Kept in shared memory, since registers are
/// scarce.
struct Segment {
  int seq;
  int count;          ///< blocks
  int first_token;    ///< of the first block
  int last_position;  ///< of the sequence's queries
  int last_token;     ///< that has codes
  int seen_begin;     ///< every query sees the coded tokens from here ...
  int seen_end;       ///< ... to here
  const std::int32_t* table;

  __device__ Segment(const Problem& p, const Cursor& cursor) : seq(cursor.seq) {
    const Sequence sequence(p, seq);
    count = cursor.count(INT_MAX);
    first_token = cursor.block * kBlockTokens;
    last_position = sequence.length - 1;
    last_token = sequence.coded_end(p, last_position) - 1;
    seen_begin = sequence.coded_begin(p, last_position);
    seen_end = sequence.coded_end(p, sequence.position(p, 0));
    table = p.block_table + Index{seq} * p.max_blocks;
  }
};

/// What a warp reads of sixteen tokens, as it lies in shared memory. All parts are copied in vectors
/// of 16 bytes.
template <class Shape>
struct Half {
  static constexpr int kWords = 4 * Shape::kLaneWords - 1;

  std::uint32_t words[16][kWords];
  std::uint32_t tails[12];  ///< 24 bits a token
  std::uint16_t norms[16];
  std::uint16_t scales[16];
  std::uint16_t values[Shape::kValueBits];  ///< bit j is token j
};

/// What a tile's warps share, made two steps ahead and one. A warp may be a step behind the others:
/// what keys are multiplied with is kept so much longer.
template <class Shape>
struct TileBuffers {
  uint2 low_queries[2][Shape::kLowEights > 0 ? Shape::kLowEights : 1][kNodes / 2][32];
  uint2 high_queries[4][Shape::kHighEights][32];
  uint4 low_products[3][Shape::kSteps][32];  ///< e^T q at the nodes, slots permuted: see `slot_of`
};

template <class Shape>
struct Shared {
  uint4 high_entries[Shape::kSteps][Shape::kHighEights][32];
  uint4 low_entries[Shape::kCodeTiles][Shape::kLowEights > 0 ? Shape::kLowEights : 1][32];
  uint4 turns[kTileBlocks][Shape::kHighEights][2][32];
  float4 node_weights[Config::kTileTokens];
  alignas(16) float2 queries[kRows][BinaryKeys::kPairs];  ///< brought to about 1
  std::uint64_t pair_turns[BinaryKeys::kPairs];
  float low_factors[kRows];   ///< from products at the nodes to scores
  float high_factors[kRows];  ///< from products with decoded keys
  Cursor cursor;  ///< at the segment's first block
  Segment segment;
  int lags[kRows];                            ///< how far a row's position is from the last one
  RowSum sums[Config::kWarps][kRows];
  std::uint64_t made[kTiles];  ///< barriers: the tile's warps have made their share of a step
  union {
    struct {
      TileBuffers<Shape> tiles[kTiles];
      Half<Shape> stages[Config::kWarps][2][2];  ///< [two blocks][two halves]
    };
    float outputs[Config::kWarps][kRows][Shape::kValueBits];
  };
};

/// Where lane `lane` of step `step` finds its products: lanes of one eight are permuted so that
/// writers meet fewer of the same banks.
__device__ __forceinline__ int slot_of(int step, int lane) {
  return lane ^ (lane >> 3 | (step & 1) << 2);
}

/// Transposes an 8 x 8 matrix of 16-bit numbers: lane 4g + q holds row g, columns 2q and 2q + 1.
__device__ __forceinline__ std::uint32_t transposed(std::uint32_t fragment) {
  std::uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(result) : "r"(fragment));
  return result;
}

/// A lane's four tokens of a block follow each other: 4 (g / 2) + 16 (g % 2) and on, so that the
/// transposed weights of two lanes are those of tokens s and s + 16, as in the values' words.
__device__ __forceinline__ int lane_token() {
  const int g = threadIdx.x % 32 / 4;
  return 4 * (g / 2) + 16 * (g % 2);
}

/// Copies blocks to shared memory, some vectors a lane. A vector lies at a distance from the
/// beginning of its page that grows with the slot of the first of its sixteen tokens.
template <class Shape>
class BlockCopy {
  using OneHalf = Half<Shape>;
  static constexpr int kVectors = sizeof(OneHalf) / 16;
  static constexpr int kRounds = (2 * kVectors + 31) / 32;

 public:
  __device__ BlockCopy(const Problem& p, const KeyCodes& codes, int head) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int byte = (threadIdx.x % 32 + 32 * i) % kVectors * 16;
      const auto set = [&](int part_begin, int base, int per_slot) {
        if (byte >= part_begin) base_[i] = base + byte - part_begin, per_slot_[i] = per_slot;
      };
      const int first = head * p.page.size;
      set(offsetof(OneHalf, words), codes.words + first * OneHalf::kWords * 4, OneHalf::kWords * 4);
      set(offsetof(OneHalf, tails), codes.tails + first * 3, 3);
      set(offsetof(OneHalf, norms), p.page.key_norms + head * p.page.norm_stride, 2);
      set(offsetof(OneHalf, scales), p.page.value_scales + head * p.page.scale_stride, 2);
      set(offsetof(OneHalf, values), p.page.value_codes + head * Shape::kValueBits * 2,
          p.page.num_code_bits / 8);
    }
  }

  /// Reads where the halves of a block lie. Beyond the last token there may be no page: the first
  /// half stands for the second, whose weights will be zero.
  __device__ __forceinline__ void find(const Problem& p, const Segment& segment, int block) {
    const int token = segment.first_token + block * kBlockTokens;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = token + 16 * half <= segment.last_token ? token + 16 * half : token;
      pages_[half] = segment.table[at >> p.page.shift];
      slots_[half] = at & (p.page.size - 1);
    }
  }
  /// Starts copying the block that was found last.
  __device__ __forceinline__ void start(const Problem& p, OneHalf* stage) const {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int vector = threadIdx.x % 32 + 32 * i;
      if (vector >= 2 * kVectors) break;
      const bool second = vector >= kVectors;
      const Index page = second ? pages_[1] : pages_[0];
      const int slot = second ? slots_[1] : slots_[0];
      copy_async_16(shared_address(reinterpret_cast<uint4*>(stage) + vector),
                    p.pages + page * p.page_stride + (base_[i] + slot * per_slot_[i]));
    }
    commit_copies();
  }

 private:
  int base_[kRounds], per_slot_[kRounds];
  int pages_[2], slots_[2];
};

/// The key codes of a lane's four tokens, and what belongs to them.
template <class Shape>
struct LaneCodes {
  std::uint32_t words[4][Shape::kLaneWords];
  uint2 norms, scales;  ///< four bf16 each

  __device__ __forceinline__ explicit LaneCodes(const Half<Shape>* stage) {
    const int q = threadIdx.x % 4, slot = lane_token() % 16;
    const Half<Shape>& half = stage[lane_token() / 16];
#pragma unroll
    for (int w = 0; w < Shape::kLaneWords; ++w) {
      // The last lane's last word is the tail: three words hold those of four tokens.
      const bool is_tail = q == 3 && w + 1 == Shape::kLaneWords;
      const std::uint32_t* const source =
          is_tail ? half.tails + slot / 4 * 3 : &half.words[slot][4 * w + q];
      const int stride = is_tail ? 1 : Half<Shape>::kWords;
#pragma unroll
      for (int t = 0; t < 4; ++t) words[t][w] = source[is_tail && t == 3 ? 2 : t * stride];
    }
    norms = *reinterpret_cast<const uint2*>(half.norms + slot);
    scales = *reinterpret_cast<const uint2*>(half.scales + slot);
    if (q == 3) spread_tails();
  }

 private:
  __device__ __forceinline__ void spread_tails() {
    constexpr int w = Shape::kLaneWords - 1;
    constexpr std::uint32_t kOne = 1u << 24;  // the code bit of what all keys have in common
    const std::uint32_t a = words[0][w], b = words[1][w], c = words[2][w];
    words[0][w] = (a & 0xffffffu) | kOne;
    words[1][w] = (__funnelshift_r(a, b, 24) & 0xffffffu) | kOne;
    words[2][w] = (__funnelshift_r(b, c, 16) & 0xffffffu) | kOne;
    words[3][w] = c >> 8 | kOne;
  }
};

/// Number t of four bf16.
__device__ __forceinline__ float bf16_of(uint2 four, int t) {
  const std::uint32_t word = t < 2 ? four.x : four.y;
  return __uint_as_float(t % 2 == 0 ? word << 16 : word & 0xffff0000u);
}

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
      (step * kTiles + tile) * Config::kTileTokens + (is_high ? 0 : a.keys.nodes[node]);
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
          &buffers.low_products[step % 3][bit_step][slot_of(bit_step, (2 * q + column) * 4 + word)]);
#pragma unroll
      for (int n = 0; n < kNodes / 2; ++n)
        target[2 * n + g % 2] =
            as_bits(__floats2half2_rn(products[n][column], products[n][2 + column]));
    }
  }
}

/// Sixteen bits of the keys of tokens 2m and 2m + 1 as an operand: bits 2 k, 2 k + 1 of the words'
/// halves.
__device__ __forceinline__ void bits_of(const std::uint32_t (&words)[4], int k, int m,
                                        std::uint32_t (&bits)[4]) {
  const std::uint32_t mask = 0x00010001u << (2 * k);
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    bits[t] = words[2 * m + t] & mask;
    bits[2 + t] = words[2 * m + t] & mask << 1;
  }
}

/// Decodes eights of pairs `[kFirst, kFirst + kCount)`, turns them and adds their products with the
/// queries to `scores`, and if asked for the products of the other pairs at the nodes.
template <class Shape, int kFirst, int kCount, bool kWithLow>
__device__ __forceinline__ void multiply_keys(const Shared<Shape>& shared,
                                              const LaneCodes<Shape>& codes, int step, int tile,
                                              int block, float (&scores)[2][4],
                                              float (&low)[2][2][4]) {
  const int lane = threadIdx.x % 32;
  const TileBuffers<Shape>& buffers = shared.tiles[tile];
  float keys[kCount][2][2][4] = {};  // [eight][real, imaginary][tokens]
#pragma unroll
  for (int w = 0; w < Shape::kLaneWords; ++w) {
    std::uint32_t words[4] = {codes.words[0][w], codes.words[1][w], codes.words[2][w],
                              codes.words[3][w]};
    // Operands of all steps, read ahead, would take more registers than there are.
#pragma unroll 1
    for (int byte = 2 * w; byte < 2 * w + 2; ++byte) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
    std::uint32_t bits[2][4];
    bits_of(words, k, 0, bits[0]);
    bits_of(words, k, 1, bits[1]);
    if constexpr (kWithLow) {
      const uint4 b = buffers.low_products[step % 3][4 * byte + k][slot_of(k, lane)];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_16x8x16(low[m][0], bits[m][0], bits[m][1], bits[m][2], bits[m][3], b.x, b.y);
        mma_16x8x16(low[m][1], bits[m][0], bits[m][1], bits[m][2], bits[m][3], b.z, b.w);
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint4 e = shared.high_entries[4 * byte + k][kFirst + i][lane];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_16x8x16(keys[i][0][m], bits[m][0], bits[m][1], bits[m][2], bits[m][3], e.x, e.y);
        mma_16x8x16(keys[i][1][m], bits[m][0], bits[m][1], bits[m][2], bits[m][3], e.z, e.w);
      }
    }
    }
#pragma unroll
    for (std::uint32_t& word : words) word >>= 8;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint2 query = buffers.high_queries[step % 4][kFirst + i][lane];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      // Cosines and sines of two pairs: of token 2m, then of token 2m + 1.
      const uint4 turn = shared.turns[block][kFirst + i][m][lane];
      std::uint32_t operand[4];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const __half2 real = __floats2half2_rn(keys[i][0][m][2 * t], keys[i][0][m][2 * t + 1]);
        const __half2 imag = __floats2half2_rn(keys[i][1][m][2 * t], keys[i][1][m][2 * t + 1]);
        const __half2 c = as_half2(t == 0 ? turn.x : turn.z), s = as_half2(t == 0 ? turn.y : turn.w);
        operand[t] = as_bits(__hfma2(real, c, __hneg2(__hmul2(imag, s))));
        operand[2 + t] = as_bits(__hfma2(real, s, __hmul2(imag, c)));
      }
      mma_16x8x16(scores[m], operand[0], operand[1], operand[2], operand[3], query.x, query.y);
    }
  }
}

/// All pairs from eight `kFirst` on, some at once: as many as there are registers for.
template <class Shape, int kFirst>
__device__ __forceinline__ void multiply_from(const Shared<Shape>& shared,
                                              const LaneCodes<Shape>& codes, int step, int tile,
                                              int block, float (&scores)[2][4],
                                              float (&low)[2][2][4]) {
  constexpr int kLeft = Shape::kHighEights - kFirst;
  constexpr int kCount = kLeft < Config::kEightsAtOnce ? kLeft : Config::kEightsAtOnce;
  multiply_keys<Shape, kFirst, kCount, kFirst == 0 && (Shape::kLowEights > 0)>(
      shared, codes, step, tile, block, scores, low);
  if constexpr (kLeft > kCount)
    multiply_from<Shape, kFirst + kCount>(shared, codes, step, tile, block, scores, low);
}

/// Scores of a lane's four tokens of a block of the tile, in powers of two, for row q.
template <class Shape>
__device__ __forceinline__ void score_keys(const Shared<Shape>& shared,
                                           const LaneCodes<Shape>& codes, int step, int tile,
                                           int block, float (&scores)[4]) {
  float low[2][2][4] = {}, high[2][4] = {};
  multiply_from<Shape, 0>(shared, codes, step, tile, block, high, low);
  const int place = block * kBlockTokens + lane_token();
  const float low_factor = shared.low_factors[threadIdx.x % 4];
  const float high_factor = shared.high_factors[threadIdx.x % 4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int m = t / 2, at = t % 2 * 2;
    float score = high[m][at] * high_factor;
    if constexpr (Shape::kLowEights > 0) {
      const float4 weight = shared.node_weights[place + t];
      const float sum = weight.x * low[m][0][at] + weight.y * low[m][0][at + 1] +
                        weight.z * low[m][1][at] + weight.w * low[m][1][at + 1];
      score += sum * low_factor;
    }
    scores[t] = score * bf16_of(codes.norms, t);
  }
}

/// cap * tanh(score / cap).
__device__ __forceinline__ float capped(float score, float cap) {
  const float grown = exp2_approx(__fdividef(score, cap) * 2.88539008177792681f);
  return cap - __fdividef(2 * cap, 1 + grown);
}

/// Takes out the scores of tokens that the row's query does not see.
__device__ __forceinline__ void hide_unseen(const Problem& p, int seq, int first_token, int lag,
                                            float (&scores)[4], float (&scales)[4]) {
  const Sequence sequence(p, seq);
  const int position = sequence.length - 1 - lag;
  const int begin = sequence.coded_begin(p, position), end = sequence.coded_end(p, position);
#pragma unroll
  for (int t = 0; t < 4; ++t)
    // What was read of tokens that nobody sees may be anything.
    if (first_token + t < begin || first_token + t >= end) scores[t] = -INFINITY, scales[t] = 0;
}

/// What a warp has gathered: lane 4g + q holds row q's largest score and a share of its sum, and
/// sums of the values' bits 16 g + 2 i (first) and 16 g + 2 i + 1 (third of four).
template <class Shape>
struct Gathered {
  float largest = -INFINITY;
  float sum = 0;
  float values[Shape::kValueTiles][4] = {};
};

/// The weights of a later score may exceed those of the largest so far by 2^kSlack before all sums
/// are rescaled; fp16 holds 2^kSlack * 2^7.
constexpr float kSlack = 8;

/// Scores to weights, as operands of the products with the bits of values: tokens s and s + 16 in
/// one register, s = 4 q + t, for column g, times 2^(7 - s % 8).
template <class Shape>
__device__ __forceinline__ void weigh(float (&scores)[4], const float (&scales)[4],
                                      Gathered<Shape>& gathered, std::uint32_t (&weights)[4]) {
  constexpr float kLeastScale = 7.8886090522101181e-31f;  // 2^-100
  float largest = -INFINITY;
#pragma unroll
  for (int t = 0; t < 4; ++t)
    largest = fmaxf(largest, scores[t] + __log2f(fmaxf(scales[t], kLeastScale)));
  if (__any_sync(~0u, largest > gathered.largest + kSlack)) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    if (largest > gathered.largest) {
      const float keep = exp2_approx(gathered.largest - largest);
      gathered.largest = largest;
      gathered.sum *= keep;
#pragma unroll
      for (int i = 0; i < Shape::kValueTiles; ++i)
        gathered.values[i][0] *= keep, gathered.values[i][2] *= keep;
    }
  }
  const float reference = fmaxf(gathered.largest, -1e30f);
  const float factor = threadIdx.x % 16 < 8 ? 128.0f : 8.0f;  // 2^(7 - (4 (g / 2) % 8))
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float weight = exp2_approx(scores[t] - reference);
    gathered.sum += weight;
    // A scale that is NaN, of a token that could not be coded, shows.
    const float scaled = weight * scales[t] * (factor / static_cast<float>(1 << t));
    weights[t] = transposed(as_bits(__floats2half2_rn(scaled, 0)));
  }
}

/// Adds weights times bits of the values. Lane 4g + q holds bits 16 g and those after it, of tokens
/// 4 q to 4 q + 3 of either half: in one byte of the words.
template <class Shape>
__device__ __forceinline__ void add_values(const Half<Shape>* stage,
                                           const std::uint32_t (&weights)[4],
                                           Gathered<Shape>& gathered) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const std::uint32_t select_first = q < 2 ? 0x5410 : 0x5511, select_second = q < 2 ? 0x7632 : 0x7733;
  const std::uint32_t lane_mask = 0x00010001u << (q % 2 * 4);
  constexpr int kLaneBits = Shape::kValueBits / 8;
#pragma unroll
  for (int vector = 0; vector < kLaneBits / 8; ++vector) {
    const int bit = g * kLaneBits + vector * 8;
    const uint4 low = *reinterpret_cast<const uint4*>(stage[0].values + bit);
    const uint4 high = *reinterpret_cast<const uint4*>(stage[1].values + bit);
    const std::uint32_t lows[4] = {low.x, low.y, low.z, low.w};
    const std::uint32_t highs[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t first = __byte_perm(lows[i], highs[i], select_first);
      const std::uint32_t second = __byte_perm(lows[i], highs[i], select_second);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const std::uint32_t mask = lane_mask << (2 * k);
        mma_16x8x16(gathered.values[4 * vector + i], first & mask, second & mask, first & mask << 1,
                    second & mask << 1, weights[2 * k], weights[2 * k + 1]);
      }
    }
  }
}

/// Merges what the warps gathered and writes it as part `slot`.
template <class Shape>
__device__ __forceinline__ void store(const Problem& p, Shared<Shape>& shared, Index slot, int head,
                                      int first_row, int rows, Gathered<Shape>& gathered) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int step = 4; step < 32; step *= 2)
    gathered.sum += __shfl_xor_sync(~0u, gathered.sum, step);
  __syncthreads();  // the tiles' memory serves the outputs now
  if (g == 0) shared.sums[warp][q] = {gathered.largest, gathered.sum};
  float* const mine = shared.outputs[warp][q] + g * (Shape::kValueBits / 8);
#pragma unroll
  for (int i = 0; i < Shape::kValueTiles; ++i)
    *reinterpret_cast<float2*>(mine + 2 * i) =
        make_float2(gathered.values[i][0], gathered.values[i][2]);
  __syncthreads();
#pragma unroll 1
  for (int item = threadIdx.x; item < rows * Shape::kValueBits; item += Config::kThreads) {
    const int row = item / Shape::kValueBits, bit = item % Shape::kValueBits;
    float largest = -INFINITY, sum = 0, value = 0;
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) largest = fmaxf(largest, shared.sums[w][row].max);
#pragma unroll 4
    for (int w = 0; w < Config::kWarps; ++w) {
      const RowSum part = shared.sums[w][row];
      const float factor = part.max == -INFINITY ? 0.0f : exp2_approx(part.max - largest);
      sum += part.sum * factor;
      if (factor > 0) value += shared.outputs[w][row][bit] * factor;
    }
    const int call_row = head * p.rows_per_head + first_row + row;
    p.value_sums[(slot * p.row_stride + call_row) * p.page.num_code_bits +
                 head * Shape::kValueBits + bit] = value * (1.0f / 16);  // 2^17 of 2^21
    if (bit == 0) p.part_sums[slot * p.row_stride + call_row] = {largest, sum};
  }
  __syncthreads();
}

/// Gathers the blocks of a segment, step by step.
template <class Shape>
__device__ __forceinline__ void run_segment(const Arguments& a, Shared<Shape>& shared,
                                            BlockCopy<Shape>& copy, int& phase, Gathered<Shape>& gathered) {
  const Problem& p = a.problem;
  const Segment& segment = shared.segment;
  const int warp = threadIdx.x / 32, tile = warp / kTileWarps, row = threadIdx.x % 4;
  const int num_steps = (segment.count + kStepBlocks - 1) / kStepBlocks;
  // Block number `round` of the warp, round kRounds * step being the first of a step.
  const auto tile_block_of = [&](int round) { return round % kRounds * kTileWarps + warp % kTileWarps; };
  const auto block_of = [&](int round) {
    return round / kRounds * kStepBlocks + tile * kTileBlocks + tile_block_of(round);
  };
  const auto find = [&](int round) { copy.find(p, segment, min(block_of(round), segment.count - 1)); };

  find(0);
  copy.start(p, shared.stages[warp][0]);
  find(1);
  const WarpBarrier made(&shared.made[tile]);
  turn_queries(a, shared, 0, tile);
  turn_queries(a, shared, 1, tile);
  made.arrive();
  made.wait(phase++ % 2);
  multiply_queries(shared, 0, tile);
  made.arrive();
#pragma unroll 1
  for (int step = 0; step < num_steps; ++step) {
    made.wait(phase++ % 2);
    multiply_queries(shared, step + 1, tile);
    turn_queries(a, shared, step + 2, tile);
    made.arrive();
#pragma unroll 1
    for (int round = step * kRounds; round < (step + 1) * kRounds; ++round) {
      __syncwarp();  // nobody reads the block before any more
      copy.start(p, shared.stages[warp][(round + 1) % 2]);
      find(round + 2);
      const int block = block_of(round);
      if (block >= segment.count) continue;
      const Half<Shape>* const stage = shared.stages[warp][round % 2];
      wait_for_copies_but<1>();
      __syncwarp();
      const LaneCodes<Shape> codes(stage);
      float scores[4], scales[4];
      score_keys(shared, codes, step, tile, tile_block_of(round), scores);
      if (p.soft_cap > 0)
#pragma unroll
        for (float& score : scores) score = capped(score, p.soft_cap);
#pragma unroll
      for (int t = 0; t < 4; ++t) scales[t] = bf16_of(codes.scales, t);
      const int first_token = segment.first_token + block * kBlockTokens;
      if (first_token < segment.seen_begin || first_token + kBlockTokens > segment.seen_end)
        hide_unseen(p, segment.seq, first_token + lane_token(), shared.lags[row], scores, scales);
      std::uint32_t weights[4];
      weigh(scores, scales, gathered, weights);
      add_values(stage, weights, gathered);
    }
  }
  made.wait(phase++ % 2);
  wait_for_copies();
}

/// Fills what does not depend on the sequence.
template <class Shape>
__device__ __forceinline__ void load_entries(const Arguments& a, Shared<Shape>& shared, int head) {
  const auto copy = [](auto& target, const void* arrays, int index) {
    constexpr int kVectors = sizeof(target) / 16;
    const uint4* const source = static_cast<const uint4*>(arrays) + Index{index} * kVectors;
#pragma unroll 4
    for (int i = threadIdx.x; i < kVectors; i += Config::kThreads)
      copy_async_16(shared_address(reinterpret_cast<uint4*>(&target) + i), source + i);
  };
  copy(shared.high_entries, a.keys.high_entries, head);
  if constexpr (Shape::kLowEights > 0) {
    copy(shared.low_entries, a.keys.low_entries, head);
    copy(shared.node_weights, a.keys.node_weights, 0);
  }
  copy(shared.turns, a.keys.turns, 0);
}

/// `memory` is shared: a `Shared<Shape>`. A thread block takes a part of the blocks of all sequences
/// for one head and four rows.
template <class Shape>
__device__ __forceinline__ void run(const Arguments& a, std::uint8_t* memory) {
  const Problem& p = a.problem;
  Shared<Shape>& shared = *reinterpret_cast<Shared<Shape>*>(memory);
  const int part = blockIdx.x / p.num_kv_heads, head = static_cast<int>(blockIdx.x) % p.num_kv_heads;
  const int first_row = static_cast<int>(blockIdx.y) * kRows;
  const int rows = min(kRows, p.rows_per_head - first_row);
  const int total = total_blocks(p);
  const int parts = value_parts(p, total);
  if (!fits(p, total) || part >= parts) return;
  load_entries(a, shared, head);
  BlockCopy<Shape> copy(p, a.codes, head);
  if (threadIdx.x < BinaryKeys::kPairs) shared.pair_turns[threadIdx.x] = p.turns[threadIdx.x];
  if (threadIdx.x == 0)
    for (std::uint64_t& barrier : shared.made) WarpBarrier(&barrier).init(kTileWarps);
  int phase = 0;
  const Cursor begin =
      cursor_at(p, part_begin(total, part, parts), part_begin(total, part + 1, parts));
  if (threadIdx.x == 0) shared.cursor = begin;
  __syncthreads();
#pragma unroll 1
  while (!shared.cursor.done()) {
    if (threadIdx.x == 0) shared.segment = Segment(p, shared.cursor);
    // Columns and pairs that nothing is written to are zeros.
#pragma unroll 1
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(shared.tiles) / 16); i += Config::kThreads)
      reinterpret_cast<uint4*>(shared.tiles)[i] = make_uint4(0, 0, 0, 0);
    load_queries(a, shared, shared.cursor.seq, head, first_row, rows);
    wait_for_copies();
    __syncthreads();
    Gathered<Shape> gathered;
    run_segment(a, shared, copy, phase, gathered);
    store(p, shared, Index{part} + shared.cursor.seq, head, first_row, rows, gathered);
    if (threadIdx.x == 0) shared.cursor.advance(p, shared.cursor.count(INT_MAX));
    __syncthreads();
  }
}

}  // namespace commvq::cuda::binary_attention
