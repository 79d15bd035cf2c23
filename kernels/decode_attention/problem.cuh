#pragma once

#include <climits>
#include <cstdint>

#include "commvq/cuda/decode_attention.hpp"

namespace commvq::cuda {

/// Tokens whose weights lie together in the workspace.
constexpr int kBlockTokens = 32;
/// Fewest blocks of a part of the values, but for the last sequence's end.
constexpr int kLeastValueBlocks = 8;

/// The largest score of a row over some tokens, in powers of two and with the value's scale
/// included where there is one, and the sum of the exponentials relative to it.
struct RowSum {
  float max;
  float sum;
};

/// What the kernels need of a `DevicePageLayout` beside one plane.
struct PageShape {
  int size;   ///< tokens
  int shift;  ///< log2 of it
  int num_code_bits;
  int value_codes;  ///< offsets in bytes
  int key_norms;
  int value_scales;
  int norm_stride;   ///< bytes from one head's norms to the next one's; 0: all heads share them
  int scale_stride;  ///< likewise of value scales
};

/// One call, as all its kernels see it. Rows are (query token, query head of a KV head); a row of
/// the whole call is head * rows_per_head + row.
struct Problem {
  const void* queries;
  void* output;
  float* lse;
  FloatType type;
  const std::uint8_t* pages;
  Index page_stride;
  const std::int32_t* block_table;
  int max_blocks;
  const std::int32_t* seq_lens;
  ExactTokens exact;
  const std::int32_t* exact_slots;
  const std::int32_t* exact_begin;
  int window;
  int sliding_window;  ///< INT_MAX: none
  float score_scale;   ///< times log2(e)
  float soft_cap;      ///< times log2(e); 0: none

  int batch;
  int num_query_tokens;
  int num_kv_heads;
  int head_dim;
  int group;          ///< query heads of a KV head
  int rows_per_head;  ///< group * num_query_tokens
  int num_rows;       ///< num_kv_heads * rows_per_head
  int row_stride;     ///< num_rows rounded up to 8
  Index max_workspace_blocks;

  int num_key_parts;       ///< into which the blocks are cut for scoring keys
  int num_exact_pieces;    ///< into which the exact tokens of a query are cut
  int exact_cost;          ///< coded tokens that are scored in the time that one exact token takes
  int num_exact_blocks;    ///< thread blocks of the first key kernel that do exact tokens alone
  int num_value_parts;     ///< likewise for adding up values
  int num_sums;            ///< of a row: of value bits or, graded, numbers
  int num_combine_blocks;  ///< among which the combination of some rows shares out the sums

  // Workspace.
  std::uint32_t* weights;   ///< [blocks][row_stride][16] pairs of fp16: tokens s and s + 16
  RowSum* block_sums;       ///< [blocks][row_stride]
  float* raw_scores;        ///< [blocks][row_stride][32]; null with a single key slice
  float* value_sums;        ///< [num_value_parts + batch][row_stride][num_sums]
  RowSum* part_sums;        ///< [num_value_parts + batch][row_stride]
  float* exact_outputs;     ///< [batch][num_rows][num_exact_pieces][head_dim]
  RowSum* exact_sums;       ///< [batch][num_rows][num_exact_pieces]
  float* block_outputs;     ///< [num_counters][CombineConfig::kRows][num_combine_blocks][head_dim]
  std::uint32_t* counters;  ///< [batch][num_kv_heads][row blocks]
  int num_counters;

  const std::uint64_t* turns;     ///< see `CodebooksView`
  const std::uint16_t* channels;  ///< likewise
  PageShape page;
};

/// Tokens of one sequence that queries see, by query position. All are bounds of half-open ranges.
struct Sequence {
  int length;
  int first_exact;  ///< tokens below have no exact copy any more, sinks apart

  __device__ Sequence(const Problem& problem, int seq) : length(problem.seq_lens[seq]) {
    first_exact =
        problem.exact_begin != nullptr ? problem.exact_begin[seq] : length - problem.exact.capacity;
    first_exact = max(first_exact, problem.exact.sinks);
    if (problem.exact.capacity == 0) first_exact = INT_MAX;
  }
  __device__ int position(const Problem& problem, int query_token) const {
    return length - problem.num_query_tokens + query_token;
  }
  /// Oldest token that the sliding window shows.
  __device__ static int oldest(const Problem& problem, int position) {
    return max(0, position + 1 - problem.sliding_window);
  }
  /// First token after the sinks that is read exactly, up to position + 1.
  __device__ int exact_begin(const Problem& problem, int position) const {
    return min(max(position + 1 - problem.window, first_exact), position + 1);
  }
  __device__ int coded_begin(const Problem& problem, int position) const {
    return max(oldest(problem, position), min(problem.exact.sinks, position + 1));
  }
  __device__ int coded_end(const Problem& problem, int position) const {
    return exact_begin(problem, position);
  }
};

/// For the combination, which counts the blocks that are done: by the first kernel of a call.
template <int kThreads>
__device__ __forceinline__ void clear_counters(const Problem& p) {
  if (blockIdx.x > 0 || blockIdx.y > 0) return;
  for (int i = threadIdx.x; i < p.num_counters; i += kThreads) p.counters[i] = 0;
}

/// Blocks of a sequence that hold coded tokens which some query sees.
struct BlockRange {
  int first;
  int count;

  __device__ BlockRange(const Problem& problem, int seq) : first(0), count(0) {
    const Sequence sequence(problem, seq);
    if (sequence.length < problem.num_query_tokens) return;
    const int begin = sequence.coded_begin(problem, sequence.position(problem, 0));
    const int end = sequence.coded_end(problem, sequence.length - 1);
    if (end <= begin) return;
    first = begin / kBlockTokens;
    count = (end + kBlockTokens - 1) / kBlockTokens - first;
  }
};

/// Blocks of all sequences together, at most INT_MAX. Called by whole warps.
__device__ inline int total_blocks(const Problem& problem) {
  Index total = 0;
  const int lane = threadIdx.x % 32;
  for (int seq = lane; seq < problem.batch; seq += 32) total += BlockRange(problem, seq).count;
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  return static_cast<int>(min(total, Index{INT_MAX}));
}

/// A place in the blocks of all sequences, one after the other.
struct Cursor {
  int seq;    ///< batch at the end
  int block;  ///< in the sequence
  int end;    ///< of the sequence's blocks
  int index;  ///< of the block in the workspace
  int stop;   ///< where this part ends

  __device__ bool done() const { return index >= stop; }
  /// Blocks from here on that belong to the same sequence and part, at most `most`.
  __device__ int count(int most) const { return min(min(end - block, stop - index), most); }
  __device__ void advance(const Problem& problem, int blocks) {
    block += blocks;
    index += blocks;
    while (block >= end && index < stop) enter(problem, seq + 1);
  }
  __device__ void enter(const Problem& problem, int new_seq) {
    seq = new_seq;
    const BlockRange range(problem, seq);
    block = range.first;
    end = range.first + range.count;
  }
};

/// The place of block `index`, up to `stop`. Called by whole warps.
__device__ inline Cursor cursor_at(const Problem& problem, int index, int stop) {
  Cursor cursor{problem.batch, 0, 0, index, stop};
  const int lane = threadIdx.x % 32;
  Index before = 0;
  for (int first = 0; first < problem.batch && index < stop; first += 32) {
    const int seq = first + lane;
    const Index count = seq < problem.batch ? BlockRange(problem, seq).count : 0;
    Index sum = count;
    for (int step = 1; step < 32; step *= 2) {
      const Index other = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += other;
    }
    const unsigned beyond = __ballot_sync(~0u, before + sum > index);
    if (beyond != 0) {
      const int found = __ffs(beyond) - 1;
      const Index start = before + __shfl_sync(~0u, sum - count, found);
      cursor.enter(problem, first + found);
      cursor.block += index - static_cast<int>(start);
      break;
    }
    before += __shfl_sync(~0u, sum, 31);
  }
  return cursor;
}

/// Parts into which values are really cut: every one of them has some blocks.
__device__ inline int value_parts(const Problem& problem, int total) {
  return min(problem.num_value_parts, (total + kLeastValueBlocks - 1) / kLeastValueBlocks);
}

/// First block of part `part` of `parts`: the first parts have one block more than the others.
__device__ inline int part_begin(int total, int part, int parts) {
  return part * (total / parts) + min(part, total % parts);
}
/// The part that holds a block; there are no empty parts.
__device__ inline int part_of(int total, int block, int parts) {
  const int least = total / parts, longer = total % parts;
  const int in_longer = longer * (least + 1);
  return block < in_longer ? block / (least + 1) : longer + (block - in_longer) / least;
}

/// True if the workspace holds all blocks; otherwise the output becomes NaN.
__device__ inline bool fits(const Problem& problem, int total) {
  return total <= problem.max_workspace_blocks;
}

/// Parts whose blocks are some of a sequence's: `[first, last]`.
struct PartRange {
  int first = 0;
  int last = -1;

  __device__ int count() const { return last - first + 1; }
};

/// Those of sequence `seq`. Called by whole warps.

__device__ inline PartRange parts_of(const Problem& p, int total, int seq) {
  PartRange range;
  const int count = BlockRange(p, seq).count;
  if (count == 0) return range;
  int before = 0;
  for (int other = threadIdx.x % 32; other < seq; other += 32) before += BlockRange(p, other).count;
  for (int step = 16; step > 0; step /= 2) before += __shfl_xor_sync(~0u, before, step);
  const int parts = value_parts(p, total);
  range.first = part_of(total, before, parts);
  range.last = part_of(total, before + count - 1, parts);
  return range;
}

/// The beginning of a part of `parts`; done at once where there is no such part. Called by whole
/// warps.
__device__ inline Cursor part_cursor(const Problem& problem, int total, int part, int parts) {
  if (!fits(problem, total) || part >= parts) return {problem.batch, 0, 0, 0, 0};
  return cursor_at(problem, part_begin(total, part, parts), part_begin(total, part + 1, parts));
}

}  // namespace commvq::cuda
