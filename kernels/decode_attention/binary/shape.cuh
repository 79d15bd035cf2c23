#pragma once

#include "decode_attention/code_reader.cuh"
#include "decode_attention/config.hpp"
#include "decode_attention/problem.cuh"

namespace commvq::cuda::binary_attention {

using Config = BinaryAttentionConfig;

constexpr int kTileWarps = Config::kTileWarps;
constexpr int kTileBlocks = Config::kTileTokens / kBlockTokens;
constexpr int kRounds = kTileBlocks / kTileWarps;  ///< blocks of a tile that a warp takes
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
  static constexpr int kSteps = 8 * kLaneWords;        ///< of sixteen key codes
  static constexpr int kCodeTiles = 8 * kLaneWords;    ///< likewise, as rows of e^T q
  static constexpr int kValueBits = 128 * kLaneWords;  ///< of a head
  static constexpr int kValueTiles = kValueBits / 16;
  /// Eights decoded at once: as many as the registers of the compiled kernel allow.
  static constexpr int kEightsAtOnce = kHighEights == 3 ? 3 : 2;
  /// Sums take registers, of which fewer warps have more.
  static constexpr int kWarps = kLaneWords == 1 ? 12 : 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTiles = kWarps / kTileWarps;  ///< of a step
  static constexpr int kStepBlocks = kTiles * kTileBlocks;
};

/// Some blocks of one sequence, and what its queries see. Kept in shared memory, since registers
/// are scarce.
struct Segment {
  int seq;
  int count;          ///< blocks
  int first_token;    ///< of the first block
  int last_position;  ///< of the sequence's queries
  int last_token;     ///< that has codes
  int seen_begin;     ///< every query sees the coded tokens from here ...
  int seen_end;       ///< ... to here
  int step_blocks;    ///< blocks of a step
  int waits_before;   ///< of every warp, on its tile's barrier, in earlier segments
  const std::int32_t* table;

  __device__ Segment(const Problem& p, const Cursor& cursor, int step_blocks_, int waits_before_)
      : seq(cursor.seq), step_blocks(step_blocks_), waits_before(waits_before_) {
    const Sequence sequence(p, seq);
    count = cursor.count(INT_MAX);
    first_token = cursor.block * kBlockTokens;
    last_position = sequence.length - 1;
    last_token = sequence.coded_end(p, last_position) - 1;
    seen_begin = sequence.coded_begin(p, last_position);
    seen_end = sequence.coded_end(p, sequence.position(p, 0));
    table = p.block_table + Index{seq} * p.max_blocks;
  }
  __device__ int num_steps() const { return (count + step_blocks - 1) / step_blocks; }
  __device__ int waits_end() const { return waits_before + num_steps() + 2; }
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
  std::uint16_t values[Shape::kValueBits];  ///< bit j is token j

  static constexpr int kVectors = (16 * kWords * 4 + 48 + 32 + 32 + 2 * Shape::kValueBits) / 16;
};

/// Where 16 bytes of a half block come from: bytes from the beginning of their page, and how many
/// more for each slot before the first of the sixteen tokens.
struct VectorPlace {
  int base;
  int per_slot;
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
  VectorPlace places[Half<Shape>::kVectors];
  Cursor cursor;  ///< at the segment's first block
  Segment segment;
  int lags[kRows];  ///< how far a row's position is from the last one
  RowSum sums[Shape::kWarps][kRows];
  /// Barriers: the tile's warps have made their share of a step.
  std::uint64_t made[Shape::kTiles];
  union {
    struct {
      TileBuffers<Shape> tiles[Shape::kTiles];
      Half<Shape> stages[Shape::kWarps][2][2];  ///< [two blocks][two halves]
    };
    float outputs[Shape::kWarps][kRows][Shape::kValueBits];
  };
};

/// A lane's four tokens of a block follow each other: 4 (g / 2) + 16 (g % 2) and on, so that the
/// transposed weights of two lanes are those of tokens s and s + 16, as in the values' words.
__device__ __forceinline__ int lane_token() {
  const int g = threadIdx.x % 32 / 4;
  return 4 * (g / 2) + 16 * (g % 2);
}

/// Where lane `lane` of step `step` finds its products: lanes of one eight are permuted so that
/// writers meet fewer of the same banks.
__device__ __forceinline__ int slot_of(int step, int lane) {
  return lane ^ (lane >> 3 | (step & 1) << 2);
}

}  // namespace commvq::cuda::binary_attention
