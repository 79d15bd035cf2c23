#pragma once

#include "commvq/cuda/device_codebooks.hpp"

#include "decode_attention/config.hpp"
#include "decode_attention/key_codes.hpp"
#include "decode_attention/key_scores/narrow_rows.cuh"
#include "decode_attention/problem.cuh"

/// What the thread blocks that score coded keys are given, and keep in shared memory.
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
/// rows for tokens 4 g + h of a block, 4 to 7 for tokens 4 g + h + 2, so that all of a lane's keys
/// may be turned alike.
template <int kWidth>
struct Shared {
  static constexpr int kHalfVectors = kWidth / 16 * 32;
  static constexpr int kTileVectors = 2 * kHalfVectors;
  static constexpr int kBufferVectors = Config::kTiles * kTileVectors;

  uint4 queries[Config::kBuffers][kBufferVectors];   ///< turned to the first token of a step
  float2 unit_queries[Config::kMaxRows][kWidth];     ///< times the pairs' units, brought to about 1
  float2 one_turns[kWidth];                          ///< RoPE by one token
  alignas(16) uint2 zero_points[kWidth / 16][4][2];  ///< [sixteen pairs][lane % 4][eight pairs]
  alignas(8) float factors[Config::kMaxRows];        ///< from sums of products to scores
  PlaneCodes planes[4];
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

}  // namespace commvq::cuda::key_scores
