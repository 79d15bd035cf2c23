#pragma once

#include "common/barrier.cuh"
#include "decode_attention/binary/block_copy.cuh"
#include "decode_attention/binary/keys.cuh"
#include "decode_attention/binary/queries.cuh"
#include "decode_attention/binary/values.cuh"
#include "decode_attention/scores.cuh"

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

/// Gathers one block, number `tile_block` of its tile, which lies in `stage`.
template <class Shape>
__device__ __forceinline__ void gather_block(const Problem& p, const Shared<Shape>& shared,
                                             const Half<Shape>* stage, int step, int tile,
                                             int tile_block, Gathered<Shape>& gathered) {
  float scores[4], scales[4];
  score_keys(shared, stage, step, tile, tile_block, scores);
  if (p.soft_cap > 0)
#pragma unroll
    for (float& score : scores) score = capped(score, p.soft_cap);
  widen(stage[lane_token() / 16].scales + lane_token() % 16, scales);
  const Segment& segment = shared.segment;
  const int block = step * Shape::kStepBlocks + tile * kTileBlocks + tile_block;
  const int first_token = segment.first_token + block * kBlockTokens;
  if (first_token < segment.seen_begin || first_token + kBlockTokens > segment.seen_end)
    hide_unseen<1>(p, segment.seq, first_token + lane_token(), shared.lags[threadIdx.x % 4], scores,
                   scales);
  std::uint32_t weights[4];
  weigh(scores, scales, gathered, weights);
  add_values(stage, weights, gathered);
}

/// Gathers the blocks of the segment, step by step: two blocks a warp and step.
template <class Shape>
__device__ __forceinline__ void run_segment(const Arguments& a, Shared<Shape>& shared,
                                            Gathered<Shape>& gathered) {
  const Problem& p = a.problem;
  const Segment& segment = shared.segment;
  const int warp = threadIdx.x / 32, tile = warp / kTileWarps;
  // Block number `round` of the warp, round kRounds * step being the first of a step.
  const auto tile_block_of = [&](int round) {
    return round % kRounds * kTileWarps + warp % kTileWarps;
  };
  const auto block_of = [&](int round) {
    return round / kRounds * Shape::kStepBlocks + tile * kTileBlocks + tile_block_of(round);
  };
  BlockCopy<Shape> copy;
  const auto find = [&](int round) {
    copy.find(p, segment, min(block_of(round), segment.count - 1));
  };

  find(0);
  copy.start(p, shared.places, shared.stages[warp][0]);
  find(1);
  const WarpBarrier made(&shared.made[tile]);
  turn_queries(a, shared, 0, tile);
  turn_queries(a, shared, 1, tile);
  made.arrive();
  made.wait(segment.waits_before % 2);
  multiply_queries(shared, 0, tile);
  made.arrive();
#pragma unroll 1
  for (int step = 0; step < segment.num_steps(); ++step) {
    made.wait((segment.waits_before + 1 + step) % 2);
    multiply_queries(shared, step + 1, tile);
    turn_queries(a, shared, step + 2, tile);
    made.arrive();
#pragma unroll 1
    for (int round = step * kRounds; round < (step + 1) * kRounds; ++round) {
      __syncwarp();  // nobody reads the block before any more
      copy.start(p, shared.places, shared.stages[warp][(round + 1) % 2]);
      find(round + 2);
      wait_for_copies_but<1>();
      __syncwarp();
      if (block_of(round) < segment.count)
        gather_block(p, shared, shared.stages[warp][round % 2], step, tile, tile_block_of(round),
                     gathered);
    }
  }
  made.wait((segment.waits_before + 1 + segment.num_steps()) % 2);
  wait_for_copies();
}

/// Fills what does not depend on the sequence.
template <class Shape>
__device__ __forceinline__ void load_entries(const Arguments& a, Shared<Shape>& shared, int head) {
  const auto copy = [](auto& target, const void* arrays, int index) {
    constexpr int kVectors = sizeof(target) / 16;
    const uint4* const source = static_cast<const uint4*>(arrays) + Index{index} * kVectors;
#pragma unroll 4
    for (int i = threadIdx.x; i < kVectors; i += Shape::kThreads)
      copy_async_16(shared_address(reinterpret_cast<uint4*>(&target) + i), source + i);
  };
  copy(shared.high_entries, a.keys.high_entries, head);
  if constexpr (Shape::kLowEights > 0) {
    copy(shared.low_entries, a.keys.low_entries, head);
    copy(shared.node_weights, a.keys.node_weights, 0);
  }
  copy(shared.turns, a.keys.turns, 0);
}

/// `memory` is shared: a `Shared<Shape>`. A thread block takes a part of the blocks of all
/// sequences for one head and four rows.
template <class Shape>
__device__ __forceinline__ void run(const Arguments& a, std::uint8_t* memory) {
  const Problem& p = a.problem;
  Shared<Shape>& shared = *reinterpret_cast<Shared<Shape>*>(memory);
  const int part = blockIdx.x / p.num_kv_heads,
            head = static_cast<int>(blockIdx.x) % p.num_kv_heads;
  const int first_row = static_cast<int>(blockIdx.y) * kRows;
  const int rows = min(kRows, p.rows_per_head - first_row);
  const int total = total_blocks(p);
  const int parts = value_parts(p, total);
  if (!fits(p, total) || part >= parts) return;
  load_entries(a, shared, head);
  find_places<Shape>(p, a.codes, head, shared.places);
  if (threadIdx.x < BinaryKeys::kPairs) shared.pair_turns[threadIdx.x] = p.turns[threadIdx.x];
  if (threadIdx.x == 0)
    for (std::uint64_t& barrier : shared.made) WarpBarrier(&barrier).init(kTileWarps);
  const Cursor begin =
      cursor_at(p, part_begin(total, part, parts), part_begin(total, part + 1, parts));
  if (threadIdx.x == 0) shared.cursor = begin;
  __syncthreads();
  bool first = true;
#pragma unroll 1
  while (!shared.cursor.done()) {
    if (threadIdx.x == 0)
      shared.segment =
          Segment(p, shared.cursor, Shape::kStepBlocks, first ? 0 : shared.segment.waits_end());
    first = false;
    // Columns and pairs that nothing is written to are zeros.
#pragma unroll 1
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(shared.tiles) / 16); i += Shape::kThreads)
      reinterpret_cast<uint4*>(shared.tiles)[i] = make_uint4(0, 0, 0, 0);
    load_queries(a, shared, shared.cursor.seq, head, first_row, rows);
    wait_for_copies();
    __syncthreads();
    Gathered<Shape> gathered;
    run_segment(a, shared, gathered);
    store(p, shared, Index{part} + shared.cursor.seq, head, first_row, rows, gathered);
    if (threadIdx.x == 0) shared.cursor.advance(p, shared.cursor.count(INT_MAX));
    __syncthreads();
  }
}

}  // namespace commvq::cuda::binary_attention
