#pragma once

#include "common/memory.cuh"
#include "common/rope.cuh"
#include "decode_attention/config.hpp"
#include "decode_attention/exact_range.cuh"
#include "decode_attention/exact_share.cuh"

/// Attention of one query token over the tokens that have exact copies, or a piece of them, for
/// some query heads of one KV head: flash attention in fp32 by one warp, which needs neither shared
/// memory nor other warps. `kPairs` are a lane's of a head: head_dim / 64.
namespace commvq::cuda::exact_tokens {

/// Query heads at once.
template <int kPairs>
constexpr int kRows = ExactConfig::rows(64 * kPairs);
/// Lanes that have the scores of a row: row r's are with lanes kRowLanes r and the next.
template <int kPairs>
constexpr int kRowLanes = 32 / kRows<kPairs>;
/// Tokens at once.
template <int kPairs>
constexpr int kTokens = kPairs <= 2 ? 4 : 2;
/// Lanes that have one score.
template <int kPairs>
constexpr int kScoreLanes = kRowLanes<kPairs> / kTokens<kPairs>;

/// What a warp computes: some query heads of one query token over a piece of the exact tokens.
struct Item {
  int seq;
  int query_token;
  int head;
  int first_row;  ///< of the KV head's query heads
  int piece;
};

/// A lane's share of a head: some pairs of keys and queries, and as many channels of values.
template <int kPairs>
struct Lane {
  int real[kPairs], imag[kPairs];  ///< channels
  std::uint64_t turns[kPairs];

  __device__ __forceinline__ explicit Lane(const Problem& p) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int pair = static_cast<int>(threadIdx.x) % 32 + 32 * i;
      real[i] = p.channels[pair];
      imag[i] = p.channels[32 * kPairs + pair];
      turns[i] = p.turns[pair];
    }
  }
  /// The lane's pairs of the head that begins at element `head`.
  __device__ __forceinline__ void load(const void* data, FloatType type, Index head,
                                       float2 (&pairs)[kPairs]) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      pairs[i] = make_float2(load_float(data, type, head + real[i]),
                             load_float(data, type, head + imag[i]));
  }
};

/// What a warp has gathered of its rows. A row's largest score and a share of its sum are with the
/// lanes that have its scores.
template <int kPairs>
struct Gathered {
  float largest = -INFINITY;
  float sum = 0;
  float outputs[kRows<kPairs>][2 * kPairs] = {};
};

/// Sums over the warp of some numbers: lane L gets that of number L / kStep for kStep lanes a
/// number.
template <int kStep, int kLanes = 16>
__device__ __forceinline__ float lane_sums(float (&numbers)[32 / kStep]) {
  if constexpr (kLanes >= kStep) {
    const bool upper = (threadIdx.x & kLanes) != 0;
    constexpr int kHalf = kLanes / kStep;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float other = upper ? numbers[i] : numbers[i + kHalf];
      numbers[i] = (upper ? numbers[i + kHalf] : numbers[i]) + __shfl_xor_sync(~0u, other, kLanes);
    }
    return lane_sums<kStep, kLanes / 2>(numbers);
  } else {
    float sum = numbers[0];
#pragma unroll
    for (int step = kLanes; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
  }
}

/// Scores of some tokens in powers of two. Keys are turned by how far they are from the query.
template <int kPairs>
__device__ __forceinline__ float scores_of(const Problem& p, const Lane<kPairs>& lane,
                                           const float2 (&queries)[kRows<kPairs>][kPairs],
                                           const float2 (&keys)[kTokens<kPairs>][kPairs],
                                           const int (&distances)[kTokens<kPairs>]) {
  float products[kRows<kPairs> * kTokens<kPairs>] = {};
#pragma unroll
  for (int t = 0; t < kTokens<kPairs>; ++t)
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 turn = rotation_of(distances[t], lane.turns[i]);
      const float2 key = keys[t][i];
      const float re = key.x * turn.x - key.y * turn.y, im = key.x * turn.y + key.y * turn.x;
#pragma unroll
      for (int row = 0; row < kRows<kPairs>; ++row)
        products[row * kTokens<kPairs> + t] += queries[row][i].x * re + queries[row][i].y * im;
    }
  const float score = lane_sums<kScoreLanes<kPairs>>(products) * p.score_scale;
  return p.soft_cap > 0 ? p.soft_cap * tanhf(score / p.soft_cap) : score;
}

/// The lane's channels of a token's values, whose head begins at element `head`.
template <int kPairs>
__device__ __forceinline__ void load_values(const Problem& p, Index head,
                                            std::uint32_t (&words)[kPairs]) {
  const Index at = head / (2 * kPairs) + threadIdx.x % 32;
  if constexpr (kPairs == 1) {
    words[0] = static_cast<const std::uint32_t*>(p.exact.values)[at];
  } else if constexpr (kPairs == 2) {
    const uint2 two = static_cast<const uint2*>(p.exact.values)[at];
    words[0] = two.x, words[1] = two.y;
  } else {
    static_assert(kPairs == 4);
    const uint4 four = static_cast<const uint4*>(p.exact.values)[at];
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  }
}

__device__ __forceinline__ float2 widen(FloatType type, std::uint32_t word) {
  if (type == FloatType::kBf16) return bf16_to_floats(word);
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

/// Adds the values of some tokens; score -infinity: not to be added.
template <int kPairs>
__device__ __forceinline__ void add_values(FloatType type, float score,
                                           const std::uint32_t (&values)[kTokens<kPairs>][kPairs],
                                           Gathered<kPairs>& gathered) {
  float largest = score;
#pragma unroll
  for (int step = kRowLanes<kPairs> / 2; step >= kScoreLanes<kPairs>; step /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  largest = fmaxf(gathered.largest, largest);
  const float weight = exp2_approx(score - largest);
  const float keep = exp2_approx(gathered.largest - largest);
  gathered.largest = largest;
  gathered.sum = gathered.sum * keep + weight;
#pragma unroll
  for (int row = 0; row < kRows<kPairs>; ++row) {
    const float row_keep = __shfl_sync(~0u, keep, kRowLanes<kPairs> * row);
#pragma unroll
    for (float& output : gathered.outputs[row]) output *= row_keep;
  }
#pragma unroll
  for (int t = 0; t < kTokens<kPairs>; ++t)
#pragma unroll
    for (int row = 0; row < kRows<kPairs>; ++row) {
      const float row_weight =
          __shfl_sync(~0u, weight, kRowLanes<kPairs> * row + kScoreLanes<kPairs> * t);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float2 two = widen(type, values[t][i]);
        gathered.outputs[row][2 * i] += row_weight * two.x;
        gathered.outputs[row][2 * i + 1] += row_weight * two.y;
      }
    }
}

/// Starts fetching a head's keys and values into the second cache level.
template <int kPairs>
__device__ __forceinline__ void prefetch(const Problem& p, Index head) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i)
    for (const void* data : {p.exact.keys, p.exact.values})
      asm volatile("prefetch.global.L2 [%0];\n" ::"l"(static_cast<const std::uint8_t*>(data) +
                                                      head * 2 + i * 128));
}

/// Gathers tokens `[begin, end)` of the range.
template <int kPairs>
__device__ __forceinline__ void gather(const Problem& p, const Item& item, const ExactRange& range,
                                       int position, int begin, int end, const Lane<kPairs>& lane,
                                       const float2 (&queries)[kRows<kPairs>][kPairs],
                                       Gathered<kPairs>& gathered) {
  const int lane_index = static_cast<int>(threadIdx.x) % 32;
  const int lane_token = lane_index % kRowLanes<kPairs> / kScoreLanes<kPairs>;
  // Where the head of a row of the slot begins.
  const int row_size = p.num_kv_heads * (64 * kPairs);
  const Index slot_head = Index{p.exact_slots[item.seq]} * p.exact.rows_per_slot() * row_size +
                          item.head * (64 * kPairs);
  const auto head_of = [&](int row) { return slot_head + Index{row} * row_size; };
  int lane_row = 0;  // of token number lane_index of 32
#pragma unroll 1
  for (int first = begin; first < end; first += kTokens<kPairs>) {
    const int place = (first - begin) % 32;
    if (place == 0) {
      lane_row = static_cast<int>(p.exact.row(0, range.token(min(first + lane_index, end - 1))));
      prefetch<kPairs>(p, head_of(lane_row));
    }
    float2 keys[kTokens<kPairs>][kPairs];
    std::uint32_t values[kTokens<kPairs>][kPairs];
    int distances[kTokens<kPairs>];
#pragma unroll
    for (int t = 0; t < kTokens<kPairs>; ++t) {
      const Index head = head_of(__shfl_sync(~0u, lane_row, place + t));
      distances[t] = range.token(min(first + t, end - 1)) - position;
      lane.load(p.exact.keys, p.exact.type, head, keys[t]);
      load_values(p, head, values[t]);
    }
    const float score = scores_of<kPairs>(p, lane, queries, keys, distances);
    add_values<kPairs>(p.exact.type, first + lane_token < end ? score : -INFINITY, values,
                       gathered);
  }
}

/// Writes what was gathered of `rows` rows, of which the first one's piece is number `first`.
template <int kPairs>
__device__ __forceinline__ void store(const Problem& p, Index first, int rows,
                                      const Gathered<kPairs>& gathered) {
  float sum = gathered.sum;
#pragma unroll
  for (int step = kRowLanes<kPairs> / 2; step >= kScoreLanes<kPairs>; step /= 2)
    sum += __shfl_xor_sync(~0u, sum, step);
  const int lane = threadIdx.x % 32;
  const int row_of_lane = lane / kRowLanes<kPairs>;
  if (lane % kRowLanes<kPairs> == 0 && row_of_lane < rows)
    p.exact_sums[first + row_of_lane * p.num_exact_pieces] = {gathered.largest, sum};
#pragma unroll
  for (int row = 0; row < kRows<kPairs>; ++row) {
    if (row >= rows) break;
    float2* const target = reinterpret_cast<float2*>(
        p.exact_outputs + (first + row * p.num_exact_pieces) * (64 * kPairs) + lane * (2 * kPairs));
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      target[i] = make_float2(gathered.outputs[row][2 * i], gathered.outputs[row][2 * i + 1]);
  }
}

/// Called by whole warps.
template <int kPairs>
__device__ __forceinline__ void run(const Problem& p, const Item& item) {
  const Sequence sequence(p, item.seq);
  const int position = sequence.position(p, item.query_token);
  const int rows = min(kRows<kPairs>, p.group - item.first_row);
  const Index first = (Index{item.seq} * p.num_rows + item.head * p.rows_per_head +
                       item.query_token * p.group + item.first_row) *
                          p.num_exact_pieces +
                      item.piece;
  Gathered<kPairs> gathered;
  if (position >= 0 && p.exact.capacity > 0) {
    const ExactRange range(p, sequence, position);
    const Lane<kPairs> lane(p);
    const Index first_head =
        ((Index{item.seq} * p.num_query_tokens + item.query_token) * p.num_kv_heads + item.head) *
            p.group +
        item.first_row;
    float2 queries[kRows<kPairs>][kPairs];
#pragma unroll
    for (int row = 0; row < kRows<kPairs>; ++row)
      lane.load(p.queries, p.type, (first_head + min(row, rows - 1)) * (64 * kPairs), queries[row]);
    gather<kPairs>(
        p, item, range, position, part_begin(range.count, item.piece, p.num_exact_pieces),
        part_begin(range.count, item.piece + 1, p.num_exact_pieces), lane, queries, gathered);
  }
  store<kPairs>(p, first, rows, gathered);
}

/// Into which a KV head's query heads are cut.
template <int kPairs>
__device__ __forceinline__ int row_groups(const Problem& p) {
  return (p.group + kRows<kPairs> - 1) / kRows<kPairs>;
}

/// Item number `index` of a call.
template <int kPairs>
__device__ __forceinline__ Item item_of(const Problem& p, int index) {
  const auto next = [&](int count) {
    const int result = index % count;
    index /= count;
    return result;
  };
  Item item;
  item.head = next(p.num_kv_heads);
  item.piece = next(p.num_exact_pieces);
  item.first_row = next(row_groups<kPairs>(p)) * kRows<kPairs>;
  item.query_token = next(p.num_query_tokens);
  item.seq = index;
  return item;
}

/// The items that fall to thread block `block` of this launch, a warp each, at least one a warp of
/// the blocks that score no keys.
template <int kThreads, int kPairs>
__device__ __forceinline__ void run_items(const Problem& p, int block) {
  constexpr int kWarps = kThreads / 32;
  const int items =
      p.num_exact_pieces * p.num_kv_heads * row_groups<kPairs>(p) * p.num_query_tokens * p.batch;
  // Most often there is a warp for each where no keys are scored, which needs no lengths.
  const bool scores_keys = block < p.num_kv_heads * p.num_key_parts;
  if (scores_keys && items <= p.num_exact_blocks * kWarps) return;
  const int coded_tokens = coded_tokens_of_part(p);
  const int item_tokens = (p.window + p.exact.sinks) / p.num_exact_pieces + 1;
  const int free_items = max(kWarps, coded_tokens / (p.exact_cost * item_tokens));
  const ExactShare share(p, block, items, free_items);
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
  for (int item = share.first + warp * share.stride; item < share.end;
       item += kWarps * share.stride)
    run<kPairs>(p, item_of<kPairs>(p, item));
}

}  // namespace commvq::cuda::exact_tokens
