#pragma once

#include <type_traits>

#include "common/barrier.cuh"
#include "common/launch.cuh"
#include "common/memory.cuh"
#include "common/rope.cuh"
#include "decode_attention/key_scores/lane_tokens.cuh"
#include "decode_attention/key_scores/products.cuh"
#include "decode_attention/key_scores/queries.cuh"
#include "decode_attention/key_scores/shared.cuh"
#include "decode_attention/key_scores/weights.cuh"

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

/// Scores the blocks of `shared.segment`, step by step.
template <int kWidth, class Reader, int kTiles>
__device__ __forceinline__ void run_segment(const Arguments& a, Shared<kWidth>& shared,
                                            std::uint32_t rows,
                                            const TokenTurns<kWidth>& token_turns) {
  constexpr bool kRegistersAreLeft = kTiles <= Reader::kTilesWithRegisters;
  using Tokens = LaneTokens<kRegistersAreLeft>;
  constexpr bool kHasQuads = Reader::kRowBits == 4;
  const Problem& p = a.problem;
  const int warp = threadIdx.x / 32;
  const Segment& segment = shared.segment;

  // The warp's block in a step; the last block where it has none.
  const auto tokens_of = [&](int step) {
    const int block = min(step * Config::kStepBlocks + warp, segment.count - 1);
    return Tokens(p, segment.seq, segment.first_token + block * kBlockTokens, segment.last_token);
  };
  // Queries are turned a step ahead; codes are read while others' rows are added up: of all of a
  // lane's tokens at once, or of those of a half.
  std::conditional_t<kHasQuads, Reader, Reader[2]> codes;
  const PlaneCodes& plane = shared.planes[threadIdx.x % 4];
  const auto fetch_codes = [&](const Tokens& of, int half) {
    if constexpr (kHasQuads) {
      of.fetch_codes(p, plane, codes);
    } else {
      of.fetch_codes(p, a.codes[0], segment.place.head, half, codes);
    }
  };
  turn_if_due(a, shared, 0);
  Tokens tokens = tokens_of(0), next = tokens;
  fetch_codes(tokens, 0);
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
    uint2 norms, scales;
#pragma unroll(kRegistersAreLeft ? 2 : 1)
    for (int half = 0; half < 2; ++half) {
      const uint4* const queries = shared.queries[buffer] + half * Shared<kWidth>::kHalfVectors;
      const auto fetch_next = [&] {
        if (half == 1 && !last_step) {
          next = tokens_of(step + 1);
          fetch_codes(next, 0);
        } else if (half == 0 && !kHasQuads) {
          fetch_codes(tokens, 1);
        }
      };
      if (half == 1) tokens.fetch_scales(p, segment.place.head, norms, scales);
      Products<kTiles> products = {};
      const auto wait_for_queries = [&] {
        if (half == 0) full.wait(number / Config::kBuffers % 2);
      };
      if constexpr (Reader::kRowBits == 8) {
        const ByteRowSums<kWidth> sums(rows, codes[0], codes[1]);
        fetch_next();
        wait_for_queries();
        multiply_sums<kTiles>(sums, shared, token_turns, queries, products);
      } else {
        const NarrowRows<Reader::kGroups> narrow_rows(
            shared.row_places[threadIdx.x % 32],
            half == 0 ? codes.token(plane, 0) : codes.token(plane, 1),  // constants
            half == 0 ? codes.token(plane, 2) : codes.token(plane, 3));
        fetch_next();
        wait_for_queries();
        multiply_rows<kRegistersAreLeft, kTiles>(narrow_rows, shared, token_turns, queries,
                                                 segment.place.rows, products);
      }
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
  const TokenTurns<kWidth> token_turns(a.slice, warp * kBlockTokens + lane / 4 * 4);
#pragma unroll 1
  for (int i = threadIdx.x; i < Config::kBuffers * Shared<kWidth>::kBufferVectors;
       i += Config::kThreads)
    shared.queries[0][i] = make_uint4(0, 0, 0, 0);
#pragma unroll 1
  for (int i = threadIdx.x; i < kWidth / 2; i += Config::kThreads)
    shared.zero_points[i / 8][i % 4][i / 4 % 2] =
        reinterpret_cast<const uint2*>(a.slice.zero_points + head * kWidth)[i];
  if constexpr (Reader::kRowBits == 4) {
    if (threadIdx.x < 4)
      shared.planes[threadIdx.x] =
          PlaneCodes(a.codes[threadIdx.x], Reader::kGroups, head, p.page.size);
    if (threadIdx.x < 32) {
      shared.row_places[threadIdx.x] = RowPlaces(lane, rows);
      for (int j = 0; j < 3; ++j)
        shared.line_weights[j][threadIdx.x] =
            line_weight(a.slice.line_weights + head * KeySlice::kNarrowWeights, j, lane);
    }
  }
  if (threadIdx.x < Config::kMaxRows) shared.factors[threadIdx.x] = 0, shared.lags[threadIdx.x] = 0;
  if (threadIdx.x < kWidth)
    shared.one_turns[threadIdx.x] = static_cast<int>(threadIdx.x) < a.slice.num_pairs
                                        ? rotation_of(1, p.turns[a.slice.first_pair + threadIdx.x])
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

  start_after_previous_kernel();
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
}

}  // namespace commvq::cuda::key_scores
