#pragma once

#include "common/sort_key.cuh"
#include "encoder_view.hpp"
#include "instructions.cuh"
#include "load_tokens.cuh"
#include "write_keys.cuh"

namespace commvq::cuda {

// Beam search over the residual stages, as `KeyEncoder` does it: per stage all extensions of the
// candidates of a token,
//     |r - Z_0[a] - Z_1[b]|^2 = (|r|^2 + |Z_0[a]|^2 - 2 <r, Z_0[a]>)   "term of a"
//                             + (|Z_1[b]|^2 - 2 <r, Z_1[b]>)           "term of b"
//                             + 2 <Z_0[a], Z_1[b]>,                    "cross term"
// of which the smallest are kept; ties go to the smaller (candidate, a, b).
//
// A block holds kNumRows residuals ("rows") of one head and group: candidate c of its
// token t is row t * beam_width + c. Per stage
// 1. all warps: inner products of the rows with both books on the matrix units, in two fp16 numbers
//    an operand, give the terms;
// 2. a warp a token: least error of every (candidate, a) over b. The kept extensions lie in the
//    beam_width least of these, so only those are searched again for their b;
// 3. the same warp: new residuals in fp32, with the host's operations in the host's order.

/// Everything that one block of kNumRows rows works on.
template <int kNumRows>
struct KeySearch {
  const KeyEncoderView& keys;
  const KeySearchShared at;
  unsigned char* shared;
  Index books;  ///< (head * groups + group) * num_stages
  int thread, lane, warp;

  __device__ float* residual(int row) const {
    return reinterpret_cast<float*>(shared + at.residuals) + row * keys.padded_row_size;
  }
  __device__ std::uint16_t* hi(int row) const {
    return reinterpret_cast<std::uint16_t*>(shared + at.hi) + row * at.operand_stride;
  }
  __device__ std::uint16_t* lo(int row) const {
    return reinterpret_cast<std::uint16_t*>(shared + at.lo) + row * at.operand_stride;
  }
  __device__ float* table(int row) const {
    return reinterpret_cast<float*>(shared + at.table) + row * at.table_stride;
  }
  __device__ float* minima(int row) const {
    return reinterpret_cast<float*>(shared + at.minima) + row * keys.codebook_size;
  }
  __device__ float* errors() const { return reinterpret_cast<float*>(shared + at.errors); }
  __device__ float* least_terms() const { return errors() + kNumRows; }
  __device__ SortKey* choices() const { return reinterpret_cast<SortKey*>(shared + at.choices); }
  __device__ std::uint32_t* history(int stage) const {
    return reinterpret_cast<std::uint32_t*>(shared + at.history) + stage * kNumRows;
  }

  /// Columns `column` and the next one.
  __device__ void store_residual(int row, int column, float2 value) const {
    *reinterpret_cast<float2*>(residual(row) + column) = value;
    value.x *= keys.residual_scale;
    value.y *= keys.residual_scale;
    const std::uint32_t rounded = pack_halves(value.x, value.y);
    *reinterpret_cast<std::uint32_t*>(hi(row) + column) = rounded;
    *reinterpret_cast<std::uint32_t*>(lo(row) + column) = pack_rests(value.x, value.y, rounded);
  }

  /// Step 1: fills the table.
  __device__ void compute_terms(int stage) const {
    using namespace append_instructions;
    constexpr int kRowTiles = kNumRows / 32;  // of 16 rows, half the block's
    constexpr int kColTiles = 4;
    constexpr int kSets = kKeySearch.num_threads / 64;
    const int first_row = warp % 2 * (kNumRows / 2);
    const int num_tiles = keys.padded_books / 8;
    const int num_steps = keys.padded_row_size / 16;
    const auto* const operands =
        reinterpret_cast<const uint4*>(keys.operands + (books + stage) * keys.operand_words());
    const float* const norms = keys.squared_norms + (books + stage) * 2 * Index{keys.codebook_size};
    for (int first = warp / 2 * kColTiles; first < num_tiles; first += kSets * kColTiles) {
      float sums[kRowTiles][kColTiles][4] = {};
      const auto read = [&](uint4(&b)[kColTiles], int step) {
#pragma unroll
        for (int n = 0; n < kColTiles; ++n)
          b[n] = first + n < num_tiles && step < num_steps
                     ? __ldg(operands + ((first + n) * num_steps + step) * 32 + lane)
                     : uint4{0, 0, 0, 0};
      };
      uint4 next[kColTiles];
      read(next, 0);
#pragma unroll 1
      for (int step = 0; step < num_steps; ++step) {
        uint4 b[kColTiles];
#pragma unroll
        for (int n = 0; n < kColTiles; ++n) b[n] = next[n];
        read(next, step + 1);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          const int row = first_row + m * 16 + lane % 16;
          const int column = step * 16 + lane / 16 * 8;
          std::uint32_t a[4];
          load_matrices(a, hi(row) + column);
#pragma unroll
          for (int n = 0; n < kColTiles; ++n) multiply_add(sums[m][n], a, b[n].x, b[n].y);
#pragma unroll
          for (int n = 0; n < kColTiles; ++n) multiply_add(sums[m][n], a, b[n].z, b[n].w);
          load_matrices(a, lo(row) + column);
#pragma unroll
          for (int n = 0; n < kColTiles; ++n) multiply_add(sums[m][n], a, b[n].x, b[n].y);
        }
      }
      const int size = keys.codebook_size;
#pragma unroll
      for (int n = 0; n < kColTiles; ++n) {
        if (first + n >= num_tiles) break;
        const int column = (first + n) * 8 + lane % 4 * 2;
        if (size % 8 == 0) {  // a tile belongs to one book
          const bool is_a = column < size;
          const int to = is_a ? column : at.first_b + column - size;
          const float2 norm = __ldg(reinterpret_cast<const float2*>(norms + column));
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int part = 0; part < 2; ++part) {
              const int row = first_row + m * 16 + part * 8 + lane / 4;
              const float error = is_a ? errors()[row] : 0.0f;
              const float2 terms{error + norm.x + sums[m][n][2 * part] * keys.product_factor,
                                 error + norm.y + sums[m][n][2 * part + 1] * keys.product_factor};
              *reinterpret_cast<float2*>(table(row) + to) = terms;
            }
          continue;
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int row = first_row + m * 16 + k / 2 * 8 + lane / 4;
            const int c = column + k % 2;
            if (c >= 2 * size) continue;
            const bool is_a = c < size;
            table(row)[is_a ? c : at.first_b + c - size] = (is_a ? errors()[row] : 0.0f) +
                                                           __ldg(norms + c) +
                                                           sums[m][n][k] * keys.product_factor;
          }
      }
    }
  }

  /// Least error of (row, a) over b, for kRows consecutive rows and a = first_a + 2 * lane and the
  /// next one. Where there is no such a, the result means nothing.
  template <int kRows>
  __device__ void least_errors(int stage, int first_row, int first_a,
                               float (&least)[kRows][2]) const {
    const float* cross = keys.cross_terms_by_b +
                         (books + stage) * keys.codebook_size * keys.padded_size + first_a +
                         2 * lane;
#pragma unroll
    for (int i = 0; i < kRows; ++i) least[i][0] = least[i][1] = __uint_as_float(0x7f800000u);
    const int size = keys.codebook_size;
    const auto visit = [&](int b, int count) {
      float2 terms[4];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (k < count)
          terms[k] = __ldg(reinterpret_cast<const float2*>(cross + (b + k) * keys.padded_size));
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        // Columns past the last b lie within the row and are not used.
        const float4 of_b = *reinterpret_cast<const float4*>(table(first_row + i) + at.first_b + b);
        const float four[4] = {of_b.x, of_b.y, of_b.z, of_b.w};
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (k < count) {
            least[i][0] = fminf(least[i][0], four[k] + terms[k].x);
            least[i][1] = fminf(least[i][1], four[k] + terms[k].y);
          }
      }
    };
    int b = 0;
    for (; b + 4 <= size; b += 4) visit(b, 4);
    if (b < size) visit(b, size - b);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int a = first_a + 2 * lane + k;
        if (a < size) least[i][k] += table(first_row + i)[a];
      }
  }

  /// The key of the first of the extensions (row of candidate, a, any b) that come after `last`.
  __device__ SortKey next_extension(int stage, int row, int candidate, int a, SortKey last) const {
    const float* const cross =
        keys.cross_terms + ((books + stage) * keys.codebook_size + a) * keys.codebook_size;
    const float of_a = table(row)[a];
    SortKey least = kLastKey;
    for (int b = lane; b < keys.codebook_size; b += 32) {
      const float error = of_a + (table(row)[at.first_b + b] + __ldg(cross + b));
      const SortKey key = sort_key(error, candidate, a, b);
      if (key > last && key < least) least = key;
    }
    return warp_least(least);
  }

  /// Step 2 for beams of one: a warp's rows eight at a time.
  __device__ void choose_greedily(int stage) const {
    constexpr int kPerWarp = kNumRows / (kKeySearch.num_threads / 32);
    constexpr int kRows = kPerWarp < 8 ? kPerWarp : 8;
    static_assert(kPerWarp % kRows == 0);
    for (int first = warp * kPerWarp; first < (warp + 1) * kPerWarp; first += kRows) {
      SortKey best[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) best[i] = kLastKey;
      for (int first_a = 0; first_a < keys.codebook_size; first_a += 64) {
        float least[kRows][2];
        least_errors<kRows>(stage, first, first_a, least);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int a = first_a + 2 * lane + k;
            const SortKey key = sort_key(least[i][k], 0, a, 0);
            if (a < keys.codebook_size && key < best[i]) best[i] = key;
          }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int a = a_of(static_cast<std::uint32_t>(warp_least(best[i])));
        const SortKey choice = next_extension(stage, first + i, 0, a, 0);
        if (lane == 0) choices()[first + i] = choice;
      }
    }
    __syncwarp();
  }

  /// Step 2 for beams of one where `screens`: finds for 8 rows at a time the least error of each a
  /// over b in 16-bit integers, whose units both the rounding of a cross term and of a term of b
  /// may miss by one half, then compares in fp32 only those a that may be the best.
  __device__ void screen_greedily(int stage) const {
    using namespace append_instructions;
    constexpr int kPerWarp = kNumRows / (kKeySearch.num_threads / 32);
    constexpr int kRows = kPerWarp < 8 ? kPerWarp : 8;
    constexpr int kTogether = 4;
    static_assert(kPerWarp % kRows == 0 && kRows % kTogether == 0);
    const int size = keys.codebook_size;
    const float unit = __ldg(keys.cross_units + books + stage);
    const float per_unit = unit > 0 ? 1 / unit : 0;
    const std::uint32_t* const cross =
        keys.rounded_cross_terms + (books + stage) * (size / 2) * keys.padded_size + 2 * lane;
    for (int first = warp * kPerWarp; first < (warp + 1) * kPerWarp; first += kRows) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float* const of_b = table(first + i) + at.first_b;
        float least = __uint_as_float(0x7f800000u);
        for (int b = lane; b < size; b += 32) least = fminf(least, of_b[b]);
        least = from_ordered_bits(__reduce_min_sync(0xffffffffu, ordered_bits(least)));
        if (lane == 0) least_terms()[first + i] = least;
        // The row's operands are no longer needed; they are written anew in step 3.
        for (int b = 2 * lane; b < size; b += 64) {
          const float2 pair = *reinterpret_cast<const float2*>(of_b + b);
          constexpr float kMost = 2 * kLargestCrossTerm + 2;
          const int low = __float2int_rn(fminf((pair.x - least) * per_unit, kMost));
          const int high = __float2int_rn(fminf((pair.y - least) * per_unit, kMost));
          *reinterpret_cast<std::uint32_t*>(hi(first + i) + b) =
              static_cast<std::uint32_t>(low) | static_cast<std::uint32_t>(high) << 16;
        }
      }
      __syncwarp();
      for (int first_a = 0; first_a < size; first_a += 64) {
        std::uint32_t least[kRows][2];  // of a and the next one, over even b and over odd b
#pragma unroll
        for (int i = 0; i < kRows; ++i) least[i][0] = least[i][1] = 0x7fff7fffu;
#pragma unroll 1
        for (int b = 0; b < size; b += 8) {
          uint2 terms[4];
#pragma unroll
          for (int k = 0; k < 4; ++k)
            terms[k] = __ldg(
                reinterpret_cast<const uint2*>(cross + (b / 2 + k) * keys.padded_size + first_a));
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            const uint4 of_b = *reinterpret_cast<const uint4*>(hi(first + i) + b);
            const std::uint32_t pairs[4] = {of_b.x, of_b.y, of_b.z, of_b.w};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              least[i][0] = add_min_pairs(pairs[k], terms[k].x, least[i][0]);
              least[i][1] = add_min_pairs(pairs[k], terms[k].y, least[i][1]);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kRows; i += kTogether) {
          unsigned lanes[kTogether][2];  // whose a may be the best
#pragma unroll
          for (int j = 0; j < kTogether; ++j)
            select_candidates(first + i + j, first_a, least[i + j], unit, lanes[j]);
          compare_candidates<kTogether>(stage, first + i, first_a, lanes);
        }
      }
    }
    __syncwarp();
  }

  /// Of a = first_a + 2 * lane + k with the least integers over even and odd b in `least[k]`, the
  /// lanes where a may be the best one.
  __device__ void select_candidates(int row, int first_a, const std::uint32_t (&least)[2],
                                    float unit, unsigned (&lanes)[2]) const {
    const int a = first_a + 2 * lane;
    float error[2];  // less the least term of b
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int integer = min(static_cast<int>(static_cast<std::int16_t>(least[k])),
                              static_cast<int>(static_cast<std::int16_t>(least[k] >> 16)));
      error[k] = a + k < keys.codebook_size ? table(row)[a + k] + unit * static_cast<float>(integer)
                                            : __uint_as_float(0x7f800000u);
    }
    const float least_error =
        from_ordered_bits(__reduce_min_sync(0xffffffffu, ordered_bits(fminf(error[0], error[1]))));
    // Two errors of a unit, and the rounding of fp32 in these sums and in the exact ones.
    const float margin = 2.01f * unit + 1e-6f * (fabsf(least_error) + fabsf(least_terms()[row]) +
                                                 6.0f * kLargestCrossTerm * unit);
#pragma unroll
    for (int k = 0; k < 2; ++k)
      lanes[k] = __ballot_sync(0xffffffffu,
                               error[k] <= least_error + margin && a + k < keys.codebook_size);
  }

  /// Finds in fp32 the best extension among the candidates of some rows, and leaves it in `choices`
  /// unless one of a smaller first_a is there that is better. The first candidates, which are
  /// mostly the only ones, go together to hide the latency of memory.
  template <int kCount>
  __device__ void compare_candidates(int stage, int first_row, int first_a,
                                     unsigned (&lanes)[kCount][2]) const {
    const int size = keys.codebook_size;
    const auto take = [&](unsigned(&of_row)[2]) {  // the next candidate
      const int k = of_row[0] != 0 ? 0 : 1;
      const int bit = __ffs(static_cast<int>(of_row[0] != 0 ? of_row[0] : of_row[1])) - 1;
      of_row[0] &= of_row[0] - 1;
      if (k == 1) of_row[1] &= of_row[1] - 1;
      return bit < 0 ? first_a : first_a + 2 * bit + k;  // none, where nothing compares (NaN): any
    };
    int a[kCount];
    SortKey best[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      a[i] = take(lanes[i]);
      best[i] = kLastKey;
    }
    for (int b = lane; b < size; b += 32) {
      float cross[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        cross[i] = __ldg(keys.cross_terms + ((books + stage) * size + a[i]) * size + b);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float* const terms = table(first_row + i);
        const SortKey key = sort_key(terms[a[i]] + (terms[at.first_b + b] + cross[i]), 0, a[i], b);
        best[i] = key < best[i] ? key : best[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) best[i] = warp_least(best[i]);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      while ((lanes[i][0] | lanes[i][1]) != 0) {
        const SortKey key = next_extension(stage, first_row + i, 0, take(lanes[i]), 0);
        best[i] = key < best[i] ? key : best[i];
      }
      if (first_a > 0) best[i] = min(best[i], choices()[first_row + i]);
    }
    __syncwarp();  // all lanes have read the choices
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (lane == 0) choices()[first_row + i] = best[i];
    __syncwarp();
  }

  /// Step 2 for one token with `width` candidates: leaves the `new_width` best extensions in
  /// `choices`, sorted.
  __device__ void choose_beam(int stage, int token, int width, int new_width) const {
    const int first_row = token * keys.beam_width;
    const int size = keys.codebook_size;
    for (int row = first_row; row < first_row + width; row += 4)
      for (int first_a = 0; first_a < size; first_a += 64) {
        float least[4][2];  // rows past the width belong to other candidates: not used
        const int base = min(row, kNumRows - 4);
        least_errors<4>(stage, base, first_a, least);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int a = first_a + 2 * lane + k;
            if (a < size && base + i >= row && base + i < first_row + width)
              minima(base + i)[a] = least[i][k];
          }
      }
    __syncwarp();
    SortKey kept = kLastKey;  // lane i: the i-th best so far
    SortKey last_row = 0;
    bool is_first = true;
    for (int i = 0; i < new_width; ++i) {
      // The next (candidate, a) in the order of its least error.
      SortKey least = kLastKey;
      for (int n = lane; n < width * size; n += 32) {
        const int candidate = n / size, a = n % size;
        const SortKey key = sort_key(minima(first_row + candidate)[a], candidate, a, 0);
        if ((is_first || key > last_row) && key < least) least = key;
      }
      last_row = warp_least(least);
      is_first = false;
      if (last_row == kLastKey) break;
      const auto choice = static_cast<std::uint32_t>(last_row);
      const int candidate = candidate_of(choice), a = a_of(choice);
      SortKey last = 0;
      bool entered = false;
      for (;;) {
        const SortKey key = next_extension(stage, first_row + candidate, candidate, a, last);
        const SortKey worst = __shfl_sync(0xffffffffu, kept, new_width - 1);
        if (key >= worst) break;
        // Later ones of the kept move up by one.
        const SortKey before = __shfl_up_sync(0xffffffffu, kept, 1);
        if (key < kept) kept = lane > 0 && key < before ? before : key;
        last = key;
        entered = true;
      }
      if (!entered) break;  // nor does any (candidate, a) after this one
    }
    if (lane < new_width) choices()[first_row + lane] = kept;
    __syncwarp();
  }

  /// Step 3 for `count` rows from `first_row` on, whose choices are made. Row i comes from itself,
  /// or in a beam from the row of its candidate. A lane reads its columns of all rows before it
  /// writes.
  template <int kMost, bool kBeam>
  __device__ void extend(int stage, int first_row, int count) const {
    const float* const rows = keys.rows + (books + stage) * 2 * keys.codebook_size * keys.row_size;
    for (int column = 2 * lane; column < keys.row_size; column += 64) {
      float2 values[kMost];
#pragma unroll
      for (int i = 0; i < kMost; ++i)
        if (i < count) {
          const auto choice = static_cast<std::uint32_t>(choices()[first_row + i]);
          const int from = first_row + (kBeam ? candidate_of(choice) : i);
          const float2 of_a =
              __ldg(reinterpret_cast<const float2*>(rows + a_of(choice) * keys.row_size + column));
          const float2 of_b = __ldg(reinterpret_cast<const float2*>(
              rows + (keys.codebook_size + b_of(choice)) * keys.row_size + column));
          const float2 old = *reinterpret_cast<const float2*>(residual(from) + column);
          values[i] = float2{old.x - of_a.x - of_b.x, old.y - of_a.y - of_b.y};
        }
#pragma unroll
      for (int i = 0; i < kMost; ++i)
        if (i < count) store_residual(first_row + i, column, values[i]);
    }
    if (lane < count) {
      const SortKey choice = choices()[first_row + lane];
      errors()[first_row + lane] = error_of(choice);
      history(stage)[first_row + lane] = static_cast<std::uint32_t>(choice);
    }
  }
};

/// The codes of kNumRows / beam_width tokens of one head and group: grid (blocks of
/// tokens, heads, groups). Writes them to the pages.
template <KeySearchKind kKind, int kNumRows>
__global__ void __launch_bounds__(kKeySearch.num_threads,
                                  kKind == KeySearchKind::kBeam ? 1 : kKeySearch.min_blocks)
    search_key_codes(const __grid_constant__ EncoderView encoder, Index num_tokens,
                     const float* unit_keys, const std::uint16_t* norms, PagedCodes pages,
                     const std::int64_t* slot_mapping) {
  extern __shared__ __align__(1024) unsigned char shared[];
  constexpr bool kGreedy = kKind != KeySearchKind::kBeam;
  constexpr int kRows = kNumRows;
  constexpr int kWarps = kKeySearch.num_threads / 32;
  const KeyEncoderView& keys = encoder.keys;
  const DevicePageLayout& layout = encoder.layout;
  const int head = static_cast<int>(blockIdx.y), group = static_cast<int>(blockIdx.z);
  const int thread = static_cast<int>(threadIdx.x);
  const KeySearch<kNumRows> search{
      keys,       KeySearchShared(keys, kNumRows),
      shared,     (Index{head} * layout.num_groups + group) * keys.num_stages,
      thread,     thread % 32,
      thread / 32};
  const int lane = search.lane, warp = search.warp;
  const int beam_width = kGreedy ? 1 : keys.beam_width;
  const int tokens_per_block = kRows / beam_width;
  const Index first_token = Index{blockIdx.x} * tokens_per_block;
  const int count = static_cast<int>(min(Index{tokens_per_block}, num_tokens - first_token));

  // All rows begin as zeros; row t * beam_width holds token t.
  const int num_pairs = layout.head_dim / 2, g = keys.group_pairs;
  for (int row = warp; row < kRows; row += kWarps) {
    const int token = row / beam_width;
    const bool used = row % beam_width == 0 && token < count;
    const float* const key =
        unit_keys +
        ((first_token + (used ? token : 0)) * layout.num_kv_heads + head) * layout.head_dim;
    float sum = 0;
    const auto read = [&](int column) {
      if (!used || column >= keys.row_size) return 0.0f;
      return key[column / g * num_pairs + group * g + column % g];
    };
    for (int column = 2 * lane; column < keys.padded_row_size; column += 64) {
      const float2 value{read(column), read(column + 1)};
      search.store_residual(row, column, value);
      sum += value.x * value.x + value.y * value.y;
    }
    sum = warp_sum(sum);
    if (lane == 0) search.errors()[row] = sum;
    for (int column = lane; column < search.at.table_stride; column += 32)
      search.table(row)[column] = 0;
  }
  __syncthreads();

  int width = 1;
  for (int stage = 0; stage < keys.num_stages; ++stage) {
    search.compute_terms(stage);
    __syncthreads();
    if constexpr (kGreedy) {
      if constexpr (kKind == KeySearchKind::kScreenedGreedy &&
                    append_instructions::kHasPackedIntegers)
        search.screen_greedily(stage);
      else
        search.choose_greedily(stage);
      search.template extend<kRows / kWarps, false>(stage, warp * (kRows / kWarps), kRows / kWarps);
    } else {
      const int new_width = min(
          beam_width, static_cast<int>(min(Index{width} * keys.codebook_size * keys.codebook_size,
                                           Index{kMaxBeamWidth})));
      for (int token = warp; token < count; token += kWarps) {
        search.choose_beam(stage, token, width, new_width);
        search.template extend<kMaxBeamWidth, true>(stage, token * beam_width, new_width);
      }
      width = new_width;
    }
    __syncthreads();
  }

  // The best candidates' paths, then their bits, a word a lane.
  auto* const codes = reinterpret_cast<std::uint16_t*>(search.residual(0));  // [tokens][books]
  const int num_books = layout.num_books;
  const int codes_stride = num_books | 1;
  for (int token = thread; token < count; token += kKeySearch.num_threads) {
    int candidate = 0;
    for (int stage = keys.num_stages - 1; stage >= 0; --stage) {
      const std::uint32_t choice = search.history(stage)[token * beam_width + candidate];
      candidate = candidate_of(choice);
      codes[token * codes_stride + 2 * stage] = static_cast<std::uint16_t>(a_of(choice));
      codes[token * codes_stride + 2 * stage + 1] = static_cast<std::uint16_t>(b_of(choice));
    }
  }
  __syncthreads();
  const int per_warp = (count + kWarps - 1) / kWarps;
  const int own_count = min(count - warp * per_warp, per_warp);
  if (own_count <= 0) return;
  write_key_codes(
      layout, head, group, codes + warp * per_warp * codes_stride, codes_stride,
      KeyTargets(layout, head, slot_mapping, norms, first_token + warp * per_warp, own_count),
      pages);
}

}  // namespace commvq::cuda
