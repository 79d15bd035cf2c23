#pragma once

#include "common/launch.cuh"
#include "decode_attention/binary/block_copy.cuh"
#include "decode_attention/binary/keys.cuh"
#include "decode_attention/binary/queries.cuh"
#include "decode_attention/binary/values.cuh"
#include "decode_attention/scores.cuh"

/// Attention over binary codes that no two KV heads share: keys by books of two rows, which is a
/// linear code k = norm * (k_0 + sum over bits b_i e_i), and values with a block a head. Nothing is
/// looked up: code bits, or numbers of some bits each, are operands of matrix products as they lie
/// in memory. A mask leaves bit s of either half of a 32-bit word: as fp16 numbers these are
/// b * 2^(s - 24).
///
/// A warp takes a block of 32 tokens at a time, for four rows (query heads); four warps share a
/// tile:
///
/// 1. Pairs that turn fast are decoded, bits times e, turned by the token's place among 128 tokens
///    and multiplied with the queries, turned to the first of these.
/// 2. Over a tile of 256 tokens the other pairs turn so little that their score is a cubic in the
///    token's place: bits times e^T q for queries turned to four places, the nodes, and Lagrange's
///    polynomials between them. So these pairs are never decoded. e^T q is computed for some tiles
///    at once, one a warp.
/// 3. Scores become weights relative to the largest score so far, whose sums with the bits of the
///    values are gathered.
namespace commvq::cuda::binary_attention {

/// Gathers block `block` of the segment, number `tile_block` of its tile, which lies in `stage`.
/// Called by all warps of the tile together, with blocks beyond the segment too.
template <class Shape>
__device__ __forceinline__ void gather_block(const Problem& p, const Shared<Shape>& shared,
                                             const Half<Shape>* stage,
                                             const LaneCodes<Shape>& codes, int step, int tile,
                                             int tile_block, int block, Gathered<Shape>& gathered) {
  const Segment& segment = shared.segment;
  const int lane = forgotten<32>(static_cast<int>(threadIdx.x) % 32);
  float scores[4], scales[4];
  score_keys(shared, stage, codes, step, tile, tile_block, lane, scores);
  if (block >= segment.count) return;
  if (p.soft_cap > 0)
#pragma unroll
    for (float& score : scores) score = capped(score, p.soft_cap);
  widen(stage[lane_token(lane) / 16].scales + lane_token(lane) % 16, scales);
  const int first_token = segment.first_token + block * kBlockTokens;
  if (first_token < segment.seen_begin || first_token + kBlockTokens > segment.seen_end)
    hide_unseen(p, segment.seq, first_token + lane_token(lane), shared.lags[lane % 4], scores,
                scales);
  std::uint32_t weights[4];
  weigh(scores, scales, lane, gathered, weights);
  if constexpr (Shape::kGraded) {
    add_numbers(stage, weights, lane, gathered);
  } else {
    add_bits(stage, weights, lane, gathered);
  }
}

/// Turns the queries of a tile for the group of steps that begins with round `round`, and finds
/// where the tokens lie that are copied meanwhile.
template <class Shape>
__device__ __forceinline__ void prepare_group(const Arguments& a, Shared<Shape>& shared, int tile,
                                              int round) {
  constexpr int kSources = sizeof(shared.sources[0]) / sizeof(Source);
  static_assert(kSources <= 32 * kTileWarps);
  const int thread = static_cast<int>(threadIdx.x) % (32 * kTileWarps);
  Source source{};
  if (thread < kSources)
    source = source_of(a.problem, shared.segment, tile, round + 1 + thread / (2 * kTileWarps),
                       thread % (2 * kTileWarps));
  wait_for_tile(tile);  // nobody needs the former group's any more
  if constexpr (Shape::kLowEights > 0) multiply_queries(a.keys, shared, round / kRounds, tile);
  turn_high_queries(shared, round / kRounds, tile);
  if (thread < kSources) (&shared.sources[tile][0][0])[thread] = source;
  show_to_async_units();
  wait_for_tile(tile);
}

/// Gathers the blocks of the segment, round by round of the warp's tile: a block a warp and round.
template <class Shape>
__device__ __forceinline__ void run_segment(const Arguments& a, Shared<Shape>& shared,
                                            Gathered<Shape>& gathered) {
  const Segment& segment = shared.segment;
  // The same for all lanes, and known to be.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const int tile = warp / kTileWarps, tile_warp = warp % kTileWarps;
  const CodePlace code_place = CodePlace::of_lane<Shape>();
  const BlockCopy<Shape> copy(shared.places);
  const int sixteen = 2 * tile_warp + copy.half();

  copy.start(source_of(a.problem, segment, tile, 0, sixteen), shared.places,
             shared.stages[warp][0]);
  int round = 0;
#pragma unroll 1
  for (; segment.round_begin(tile, round) < segment.count; ++round) {
    const int group_round = round % Shape::kGroupRounds;
    if (group_round == 0) prepare_group(a, shared, tile, round);
    const Half<Shape>* const stage = shared.stages[warp][round % 2];
    wait_for_copies();
    __syncwarp();  // the block is there, and nobody reads the one before any more
    const LaneCodes<Shape> codes(stage, code_place, forgotten<32>(threadIdx.x % 32));
    const Source source = shared.sources[tile][group_round][sixteen];
    copy.start(source, shared.places, shared.stages[warp][(round + 1) % 2]);
    gather_block(a.problem, shared, stage, codes, group_round / kRounds, tile,
                 round % kRounds * kTileWarps + tile_warp,
                 segment.round_begin(tile, round) + tile_warp, gathered);
  }
  wait_for_copies();
  // All tiles pass as many barriers as the first one, though they need not: compute-sanitizer's
  // racecheck takes warps that have passed different numbers for unsynchronised.
  constexpr int kGroupRounds = Shape::kGroupRounds;
  round = (round + kGroupRounds - 1) / kGroupRounds * kGroupRounds;
#pragma unroll 1
  for (; segment.round_begin(0, round) < segment.count; round += kGroupRounds) {
    wait_for_tile(tile);
    wait_for_tile(tile);
  }
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
/// sequences for one head and four rows. What depends on the codebooks alone comes before the
/// previous kernel of the stream has ended.
template <class Shape>
__device__ __forceinline__ void run(const Arguments& a, std::uint8_t* memory) {
  const Problem& p = a.problem;
  Shared<Shape>& shared = *reinterpret_cast<Shared<Shape>*>(memory);
  const int part = blockIdx.x / p.num_kv_heads,
            head = static_cast<int>(blockIdx.x) % p.num_kv_heads;
  const int first_row = static_cast<int>(blockIdx.y) * kRows;
  const int rows = min(kRows, p.rows_per_head - first_row);
  load_entries(a, shared, head);
  find_places<Shape>(p, a.codes, head, shared.places);
  if (threadIdx.x < BinaryKeys::kPairs) {
    const std::uint64_t turns = p.turns[threadIdx.x];
    shared.pair_turns[threadIdx.x] = turns;
    shared.node_turns[threadIdx.x] = rotation_of(a.keys.nodes[0] - a.keys.nodes[2], turns);
  }
  wait_for_previous_kernel();
  if (threadIdx.x < 32) {
    const int total = total_blocks(p);
    const Cursor begin = part_cursor(p, total, part, value_parts(p, total));
    if (threadIdx.x == 0) shared.cursor = begin;
  }
  wait_for_copies();
  show_to_async_units();
  __syncthreads();
#pragma unroll 1
  while (!shared.cursor.done()) {
    if (threadIdx.x == 0) shared.segment = Segment(p, shared.cursor, Shape::kStepBlocks);
    load_queries(a, shared, shared.cursor.seq, head, first_row, rows);
    __syncthreads();
    Gathered<Shape> gathered;
    run_segment(a, shared, gathered);
    store(p, shared, Index{part} + shared.cursor.seq, head, first_row, rows, gathered);
    if (threadIdx.x == 0) shared.cursor.advance(p, shared.cursor.count(INT_MAX));
    __syncthreads();
  }
}

}  // namespace commvq::cuda::binary_attention
