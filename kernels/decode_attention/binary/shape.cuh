#pragma once

#include "decode_attention/config.hpp"
#include "decode_attention/key_codes.hpp"
#include "decode_attention/problem.cuh"

namespace commvq::cuda::binary_attention {

using Config = BinaryAttentionConfig;

constexpr int kTileWarps = Config::kTileWarps;
constexpr int kTileBlocks = Config::kTileTokens / kBlockTokens;
constexpr int kRounds = kTileBlocks / kTileWarps;  ///< blocks of a tile that a warp takes
constexpr int kRoundTokens = kTileWarps * kBlockTokens;
constexpr int kNodes = BinaryKeys::kNodes;
constexpr int kRows = Config::kRows;

struct Arguments {
  Problem problem;
  BinaryKeys keys;
  KeyCodes codes;
};

/// Sizes that follow from the pairs that are decoded, in eights, the words of key codes that a lane
/// holds of a token, and whether a byte of keys and values is four numbers of 3, 2, 2 and 1 bits,
/// or eight bits.
template <int kHighEights_, int kLaneWords_, bool kGraded_>
struct Shape {
  static constexpr bool kGraded = kGraded_;
  static constexpr int kWordEights = kGraded ? 8 : 16;  ///< eights of codes of four lanes' words
  static constexpr int kLaneWords = kLaneWords_;
  static constexpr int kHighEights = kHighEights_;
  static constexpr int kLowEights = BinaryKeys::kPairs / 8 - kHighEights;
  static constexpr int kCodeEights = kWordEights * kLaneWords;
  static constexpr int kValueBits = 128 * kLaneWords;  ///< of a head
  static constexpr int kValueSums = kGraded ? kValueBits / 2 : kValueBits;
  /// Sums take registers, of which fewer warps have more.
  static constexpr int kWarps = kHighEights == 3   ? (kLaneWords == 1 || kGraded ? 16 : 12)
                                : kHighEights == 5 ? (kLaneWords == 1 ? 12 : 8)
                                                   : 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTiles = kWarps / kTileWarps;  ///< of a step
  static constexpr int kStepBlocks = kTiles * kTileBlocks;
  /// Steps for which queries are turned at once.
  static constexpr int kGroupSteps = kGraded ? 4 : 2;
  static constexpr int kGroupRounds = kGroupSteps * kRounds;
};

/// Some blocks of one sequence, and what its queries see. Kept in shared memory, since registers
/// are scarce.
struct Segment {
  int seq;
  int count;          ///< blocks
  int first_token;    ///< of the first block
  int last_position;  ///< of the sequence's queries
  int last_half;      ///< first of the last sixteen tokens of which some have codes
  int seen_begin;     ///< every query sees the coded tokens from here ...
  int seen_end;       ///< ... to here
  int step_blocks;    ///< blocks of a step
  const std::int32_t* table;

  __device__ Segment(const Problem& p, const Cursor& cursor, int step_blocks_)
      : seq(cursor.seq), step_blocks(step_blocks_) {
    const Sequence sequence(p, seq);
    count = cursor.count(INT_MAX);
    first_token = cursor.block * kBlockTokens;
    last_position = sequence.length - 1;
    last_half = (sequence.coded_end(p, last_position) - 1) / 16 * 16;
    seen_begin = sequence.coded_begin(p, last_position);
    seen_end = sequence.coded_end(p, sequence.position(p, 0));
    table = p.block_table + Index{seq} * p.max_blocks;
  }
  /// First block of round `round` of a tile.
  __device__ int round_begin(int tile, int round) const {
    return round / kRounds * step_blocks + tile * kTileBlocks + round % kRounds * kTileWarps;
  }
};

/// What a warp reads of sixteen tokens, as it lies in shared memory. All parts are copied in
/// vectors of 16 bytes.
template <class Shape>
struct Half {
  static constexpr int kWords = 4 * Shape::kLaneWords - 1;

  std::uint32_t words[16][kWords];
  std::uint32_t tails[12];  ///< 24 bits a token
  std::uint16_t norms[16];
  std::uint16_t scales[16];
  /// Bit j of a word is token j; graded, sixteen bits of a token after the other's.
  std::uint16_t values[Shape::kValueBits];

  static constexpr int kVectors = (16 * kWords * 4 + 48 + 32 + 32 + 2 * Shape::kValueBits) / 16;
};

/// Where 16 bytes of a half block come from: bytes from the beginning of their page, and how many
/// more for each slot before the first of the sixteen tokens.
struct VectorPlace {
  int base;
  int per_slot;
};

/// Where sixteen tokens lie.
struct Source {
  const std::uint8_t* page;
  int slot;  ///< of the first one
};

/// What key codes are multiplied with: matrices of 8 columns x 8 codes, a column after the other.
/// For the places of codes see `BinaryKeys`.
template <class Shape, int kColumnEights>
using CodeOperand = std::uint32_t[kColumnEights][Shape::kCodeEights][32];

/// Turned queries of a group of steps of a tile.
template <class Shape>
struct TurnedQueries {
  static constexpr int kSteps = Shape::kGroupSteps;
  /// e^T q at four nodes of each step's tile, for four rows.
  alignas(128) CodeOperand<Shape, 2> low[Shape::kLowEights > 0 ? kSteps : 1];
  /// To a round's first token: operands, of a row after the other.
  uint2 high[kSteps][kRounds][Shape::kHighEights][4 * kRows];
};

template <class Shape>
struct Shared {
  static constexpr int kLowEights = Shape::kLowEights > 0 ? Shape::kLowEights : 1;

  /// Real and imaginary parts of eights of pairs.
  alignas(128) CodeOperand<Shape, 2 * Shape::kHighEights> high_entries;
  /// Matrices of 8 codes x 8 pairs, real parts and imaginary ones, a code after the other.
  alignas(128) std::uint32_t low_entries[kLowEights][2][Shape::kCodeEights][32];
  TurnedQueries<Shape> turned[Shape::kTiles];
  uint4 turns[kTileWarps][Shape::kHighEights][2][32];
  float4 node_weights[Config::kTileTokens];
  alignas(16) float2 queries[kRows][BinaryKeys::kPairs];  ///< brought to about 1
  std::uint64_t pair_turns[BinaryKeys::kPairs];
  alignas(16) float2 node_turns[BinaryKeys::kPairs];  ///< from the first two nodes to the others
  float low_factors[kRows];                           ///< from products at the nodes to scores
  float high_factors[kRows];                          ///< from products with decoded keys
  VectorPlace places[Half<Shape>::kVectors];
  /// Of the rounds after those of a group, one round later, and the round's sixteens.
  Source sources[Shape::kTiles][Shape::kGroupRounds][2 * kTileWarps];
  Cursor cursor;  ///< at the segment's first block
  Segment segment;
  int lags[kRows];  ///< how far a row's position is from the last one
  RowSum sums[Shape::kWarps][kRows];
  union {
    alignas(16) Half<Shape> stages[Shape::kWarps][2][2];  ///< [two blocks][two halves]
    alignas(16) float outputs[Shape::kWarps][kRows][Shape::kValueSums];
  };
};

/// A lane's four tokens of a block follow each other: 4 (g / 2) + 16 (g % 2) and on, so that the
/// transposed weights of two lanes are those of tokens s and s + 16, as in the values' words.
__device__ __forceinline__ int lane_token(int lane) {
  const int g = lane / 4;
  return 4 * (g / 2) + 16 * (g % 2);
}

/// A number that the compiler knows nothing of but that it is in [0, kLimit): what follows from it
/// is computed where it is needed, not kept in registers from loop to loop, of which there are none
/// to spare.
template <int kLimit>
__device__ __forceinline__ int forgotten(int number) {
  asm volatile("" : "+r"(number));
  __builtin_assume(number >= 0 && number < kLimit);
  return number;
}

/// Waits for all warps of a tile.
__device__ __forceinline__ void wait_for_tile(int tile) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(1 + tile), "n"(kTileWarps * 32) : "memory");
}

}  // namespace commvq::cuda::binary_attention
