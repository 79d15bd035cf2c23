#pragma once

#include "common/bulk_copy.cuh"
#include "common/sort_key.cuh"
#include "greedy_stage.hpp"
#include "instructions.cuh"
#include "load_tokens.cuh"
#include "write_keys.cuh"

namespace commvq::cuda {

// The greedy search for key codes where warpgroups multiply: tied books of 64 centroids over 64
// pairs. A warp has 16 residuals ("rows") in registers, as the matrix instruction wants and gives
// them: lane 4g + t has of rows g and g + 8 numbers 8 n + 2 t and the next one. Per stage
// 1. inner products of the rows with the book give the terms of a, and those of the rows times -j
//    the terms of b (see key_search.cuh);
// 2. in 16-bit integers, for each b the least sum of a term of a and a cross term, all b of a lane
//    at a time, so that all rows of the warp need the same a together;
// 3. the b that may be the best within the integers' rounding, and of these the a: mostly one each;
//    where there are more, they are compared in fp32;
// 4. a matrix product takes the chosen centroids off the rows.

/// Real and imaginary parts of residuals, or terms of a and of b: [eight columns at a time][row g:
/// two columns, row g + 8: the same].
struct GreedyRows {
  float half[2][8][4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 64; ++i) half[i / 32][i / 4 % 8][i % 4] = 0;
  }
};

/// Numbers between rows of a warp's terms of a in shared memory: no two rows share a bank.
inline constexpr int kGreedyTermStride = GreedyStage::kSize + 4;

/// Shared memory of a block, offsets in bytes. There are two blocks on a multiprocessor: while one
/// waits for products, the other one has the rest to do.
struct GreedySearchShared {
  /// Stages begin on 1024 bytes, where swizzles do.
  static constexpr int kStageBytes = (GreedyStage::kBytes + 1023) / 1024 * 1024;
  int stages;    ///< GreedyStage [2], one of which is being copied
  int barriers;  ///< CopyBarrier of either stage
  int terms;     ///< uint32 [rows][kGreedyTermStride]: terms of a, twice each
  int codes;     ///< uint16 [rows][codes_stride]
  int codes_stride;
  int bytes;

  COMMVQ_HOST_DEVICE explicit GreedySearchShared(int num_books) {
    codes_stride = num_books | 1;
    stages = 0;
    barriers = stages + 2 * kStageBytes;
    terms = barriers + 16;
    codes = terms + 4 * kGreedySearch.num_rows * kGreedyTermStride;
    bytes = codes + 2 * kGreedySearch.num_rows * codes_stride;
  }
};

/// The row's least value of four lanes, which is a row.
template <class T>
__device__ __forceinline__ T row_least(T value) {
  value = min(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return min(value, __shfl_xor_sync(0xffffffffu, value, 2));
}
__device__ __forceinline__ int row_sum(int value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}
/// Sets of a lane's columns of a row: bit n is column 8 n + 2 t, bit n + 16 the next one.
/// The first column of the row's sets, which lose it; 64: there is none.
__device__ __forceinline__ int take_column(unsigned& mask) {
  const int first = static_cast<int>(threadIdx.x) % 4 * 2;
  const int even = __ffs(static_cast<int>(mask & 0xffffu)) - 1;
  const int odd = __ffs(static_cast<int>(mask >> 16)) - 1;
  const int own = min(even >= 0 ? even * 8 + first : GreedyStage::kSize,
                      odd >= 0 ? odd * 8 + first + 1 : GreedyStage::kSize);
  const int column = row_least(own);
  if (own == column && column < GreedyStage::kSize) mask &= ~(1u << (column / 8 + column % 2 * 16));
  return column;
}

/// One warp's search of one stage.
struct GreedySearch {
  const unsigned char* stage;  ///< GreedyStage in shared memory
  std::uint32_t* terms_of_a;   ///< the warp's rows
  const float* cross_terms;    ///< fp32, [a][b]
  float product_factor;        ///< scaled product -> -2 <row, centroid>
  int lane;

  __device__ float unit() const {
    return *reinterpret_cast<const float*>(stage + GreedyStage::kUnit);
  }
  __device__ std::uint32_t* row_of_terms(int part) const {
    return terms_of_a + (part * 8 + lane / 4) * kGreedyTermStride;
  }

  /// Step 1.
  __device__ void compute_terms(const GreedyRows& rows, GreedyRows& terms) const {
    using namespace append_instructions;
    std::uint32_t hi[2][4][4], lo[2][4][4];
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int half = i / 16, step = i / 4 % 4, k = i % 4;
      // Row g, row g + 8; the same of the next eight columns.
      const float* const pair = rows.half[half][2 * step + k / 2] + k % 2 * 2;
      hi[half][step][k] = pack_halves(pair[0], pair[1]);
      lo[half][step][k] = pack_rests(pair[0], pair[1], hi[half][step][k]);
    }
    terms.clear();
    const std::uint64_t centroids = operand_descriptor(stage);
    const auto multiply = [&](auto sign, float(&sums)[8][4], int of_row, int of_centroid,
                              int step) {
      const std::uint64_t high =
          advanced(centroids, of_centroid * GreedyStage::kHalfBytes + step * 32);
      multiply_add_rows<sign.value>(sums, hi[of_row][step], high);
      multiply_add_rows<sign.value>(sums, hi[of_row][step],
                                    advanced(high, GreedyStage::kPartBytes));
      multiply_add_rows<sign.value>(sums, lo[of_row][step], high);
    };
    constexpr std::integral_constant<int, 1> kPlus;
    constexpr std::integral_constant<int, -1> kMinus;
    begin_warpgroup_products();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      multiply(kPlus, terms.half[0], 0, 0, step);
      multiply(kPlus, terms.half[0], 1, 1, step);
      multiply(kPlus, terms.half[1], 1, 0, step);  // <r, j z> = <im r, re z> - <re r, im z>
      multiply(kMinus, terms.half[1], 0, 1, step);
    }
    commit_warpgroup_products();
    finish_warpgroup_products(terms.half[0]);
    finish_warpgroup_products(terms.half[1]);
    const auto* const norms = reinterpret_cast<const float2*>(stage + GreedyStage::kNorms);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 norm = norms[n * 4 + lane % 4];  // j changes no norm
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& term = terms.half[i / 4][n][i % 4];
        term = (i % 2 == 0 ? norm.x : norm.y) + term * product_factor;
      }
    }
  }

  /// Writes a row's terms of a, less the least one, as integers; `negated` receives minus the
  /// lane's, two a word. Returns the least.
  __device__ float write_terms_of_a(const GreedyRows& terms, int part, float per_unit,
                                    std::uint32_t (&negated)[8]) const {
    const auto term = [&](int i) { return terms.half[0][i / 2][2 * part + i % 2]; };
    float least = term(0);
#pragma unroll
    for (int i = 1; i < 16; ++i) least = fminf(least, term(i));
    least = row_least(least);
    constexpr float kMost = 2 * kLargestCrossTerm + 2;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int first = __float2int_rn(fminf((term(2 * n) - least) * per_unit, kMost));
      const int second = __float2int_rn(fminf((term(2 * n + 1) - least) * per_unit, kMost));
      *reinterpret_cast<uint2*>(row_of_terms(part) + n * 8 + lane % 4 * 2) =
          uint2{first * 0x10001u, second * 0x10001u};
      negated[n] = (static_cast<std::uint32_t>(-first) & 0xffffu) |
                   static_cast<std::uint32_t>(-second) << 16;
    }
    return least;
  }

  /// Step 2: of both rows and the lane's b, two a word, the least sums over all a.
  __device__ void least_sums(std::uint32_t (&least)[2][8]) const {
    using namespace append_instructions;
#pragma unroll
    for (int n = 0; n < 8; ++n) least[0][n] = least[1][n] = 0x7fff7fffu;
    const unsigned char* const cross = stage + GreedyStage::kCrossTerms;
#pragma unroll 1
    for (int first = 0; first < GreedyStage::kSize; first += 8) {
#pragma unroll
      for (int four = 0; four < 8; four += 4) {
        const uint4 of_a[2] = {*reinterpret_cast<const uint4*>(row_of_terms(0) + first + four),
                               *reinterpret_cast<const uint4*>(row_of_terms(1) + first + four)};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          // `first` does not change the place of a's pieces among each other.
          const unsigned char* const of_k = cross + first * 128;
          const uint4 low = *reinterpret_cast<const uint4*>(
              of_k + GreedyStage::cross_piece(four + k, 0, lane % 4));
          const uint4 high = *reinterpret_cast<const uint4*>(
              of_k + GreedyStage::cross_piece(four + k, 1, lane % 4));
          const std::uint32_t words[8] = {low.x,  low.y,  low.z,  low.w,
                                          high.x, high.y, high.z, high.w};
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            const std::uint32_t four_a[4] = {of_a[part].x, of_a[part].y, of_a[part].z,
                                             of_a[part].w};
#pragma unroll
            for (int n = 0; n < 8; ++n)
              least[part][n] = add_min_pairs(four_a[k], words[n], least[part][n]);
          }
        }
      }
    }
  }

  /// The lane's b of a row that may be the best ones.
  __device__ unsigned candidates_b(const GreedyRows& terms, const std::uint32_t (&least)[8],
                                   int part, float least_of_a) const {
    const float of_one = unit();
    float errors[16];  // less the least term of a
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const auto sum = static_cast<std::int16_t>(least[i / 2] >> (i % 2 * 16));
      errors[i] = terms.half[1][i / 2][2 * part + i % 2] + of_one * static_cast<float>(sum);
    }
    float best = errors[0];
#pragma unroll
    for (int i = 1; i < 16; ++i) best = fminf(best, errors[i]);
    best = row_least(best);
    // Two errors of a unit, and the rounding of fp32 in these sums and in the exact ones.
    const float limit = best + (2.01f * of_one + 1e-6f * (fabsf(best) + fabsf(least_of_a) +
                                                          6.0f * kLargestCrossTerm * of_one));
    unsigned mask = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) mask |= errors[i] <= limit ? 1u << (i / 2 + i % 2 * 16) : 0;
    return mask;
  }

  /// The lane's a of a row that may be the best ones beside b: of two sums, four numbers are
  /// rounded.
  __device__ unsigned candidates_a(const std::uint32_t (&negated)[8], int b) const {
    using namespace append_instructions;
    constexpr std::uint32_t kLeast = 0x80008000u;
    const unsigned char* const cross = stage + GreedyStage::kCrossTerms;
    const uint4 low =
        *reinterpret_cast<const uint4*>(cross + GreedyStage::cross_piece(b, 0, lane % 4));
    const uint4 high =
        *reinterpret_cast<const uint4*>(cross + GreedyStage::cross_piece(b, 1, lane % 4));
    // Minus the cross terms of (a, b), so that the largest sums are wanted.
    std::uint32_t sums[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    std::uint32_t largest = kLeast;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      sums[n] = add_max_pairs(sums[n], negated[n], kLeast);
      largest = add_max_pairs(sums[n], 0, largest);
    }
    const int of_lane = max(static_cast<int>(static_cast<std::int16_t>(largest)),
                            static_cast<int>(static_cast<std::int16_t>(largest >> 16)));
    const int missing = 2 + row_least(-of_lane);  // to a number that is not negative
    const std::uint32_t pair = (static_cast<std::uint32_t>(missing) & 0xffffu) * 0x10001u;
    unsigned mask = 0;
#pragma unroll
    for (int n = 0; n < 8; ++n)
      mask |= (~add_max_pairs(sums[n], pair, kLeast) >> 15 & 0x10001u) << n;
    return mask;
  }

  /// A row's term in a column, for all its lanes.
  __device__ float term_of(const float (&terms)[8][4], int part, int column) const {
    const int own = column / 8 * 2 + column % 2;
    float value = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (i == own) value = terms[i / 2][2 * part + i % 2];
    return __shfl_sync(0xffffffffu, value, (lane & ~3) | column / 2 % 4);
  }

  /// Step 3 for rows that have several candidates, and the others of the warp: in fp32.
  __device__ std::uint32_t compare(const GreedyRows& terms, const std::uint32_t (&negated)[8],
                                   int part, unsigned mask_b) const {
    SortKey best = kLastKey;
    while (__ballot_sync(0xffffffffu, mask_b != 0) != 0) {
      const int b = take_column(mask_b);
      const bool has_b = b < GreedyStage::kSize;
      unsigned mask_a = candidates_a(negated, has_b ? b : 0);
      if (!has_b) mask_a = 0;
      while (__ballot_sync(0xffffffffu, mask_a != 0) != 0) {
        const int a = take_column(mask_a);
        const bool has_a = a < GreedyStage::kSize;
        const float of_a = term_of(terms.half[0], part, has_a ? a : 0);
        const float of_b = term_of(terms.half[1], part, has_b ? b : 0);
        if (!has_a) continue;
        const float cross = __ldg(cross_terms + a * GreedyStage::kSize + b);
        const SortKey key = sort_key(of_a + (of_b + cross), 0, a, b);
        best = key < best ? key : best;
      }
    }
    return static_cast<std::uint32_t>(best);
  }

  /// Steps 2 and 3: the choices of both rows, as in a sort key. Where nothing compares (NaN), any.
  __device__ void choose(const GreedyRows& terms, std::uint32_t (&choices)[2]) const {
    const float of_one = unit();
    const float per_unit = of_one > 0 ? 1 / of_one : 0;
    std::uint32_t negated[2][8];
    const float least_of_a[2] = {write_terms_of_a(terms, 0, per_unit, negated[0]),
                                 write_terms_of_a(terms, 1, per_unit, negated[1])};
    __syncwarp();
    std::uint32_t least[2][8];
    least_sums(least);
    unsigned masks_b[2];
    bool is_clear = true;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      masks_b[part] = candidates_b(terms, least[part], part, least_of_a[part]);
      unsigned left = masks_b[part];
      const int b = take_column(left) % GreedyStage::kSize;
      unsigned mask_a = candidates_a(negated[part], b);
      const int count = row_sum(__popc(masks_b[part]) * 256 + __popc(mask_a));
      is_clear = is_clear && count == 257;
      choices[part] = static_cast<std::uint32_t>(take_column(mask_a) << 14 | b);
    }
    if (__all_sync(0xffffffffu, is_clear)) return;
#pragma unroll
    for (int part = 0; part < 2; ++part)
      choices[part] = compare(terms, negated[part], part, masks_b[part]) & (63u << 14 | 63u);
  }

  /// Step 4.
  __device__ void take_off(const std::uint32_t (&choices)[2], GreedyRows& rows) const {
    using namespace append_instructions;
    // Row i of an operand is 1 at the column of its centroid, two columns a word.
    std::uint32_t of_a[4][4], of_b[4][4];
    const auto chosen = [&](int code, int step, int k) {
      constexpr std::uint32_t kOne = 0x3c00;
      return code / 2 == step * 8 + k / 2 * 4 + lane % 4 ? kOne << (code % 2 * 16) : 0;
    };
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      of_a[i / 4][i % 4] = chosen(a_of(choices[i % 2]), i / 4, i % 4);
      of_b[i / 4][i % 4] = chosen(b_of(choices[i % 2]), i / 4, i % 4);
    }
    const std::uint64_t centroids = operand_descriptor(stage);
    begin_warpgroup_products();
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // steps, hi and lo
      const std::uint64_t real =
          advanced(centroids, i % 2 * GreedyStage::kPartBytes + i / 2 * 16 * 128);
      const std::uint64_t imaginary = advanced(real, GreedyStage::kHalfBytes);
      multiply_add_columns<-1>(rows.half[0], of_a[i / 2], real);
      multiply_add_columns<1>(rows.half[0], of_b[i / 2], imaginary);  // j z = -im z + j re z
      multiply_add_columns<-1>(rows.half[1], of_a[i / 2], imaginary);
      multiply_add_columns<-1>(rows.half[1], of_b[i / 2], real);
    }
    commit_warpgroup_products();
    finish_warpgroup_products(rows.half[0]);
    finish_warpgroup_products(rows.half[1]);
  }
};

/// The codes of 64 tokens of one head and group: grid (blocks of tokens, heads, groups).
__global__ void __launch_bounds__(kGreedySearch.num_threads, 2)
    search_greedy_codes([[maybe_unused]] const __grid_constant__ EncoderView encoder,
                        [[maybe_unused]] Index num_tokens, [[maybe_unused]] const float* unit_keys,
                        [[maybe_unused]] const std::uint16_t* norms,
                        [[maybe_unused]] PagedCodes pages,
                        [[maybe_unused]] const std::int64_t* slot_mapping) {
  if constexpr (append_instructions::kHasWarpgroups) {
    using namespace append_instructions;
    extern __shared__ __align__(1024) unsigned char shared[];
    const KeyEncoderView& keys = encoder.keys;
    const DevicePageLayout& layout = encoder.layout;
    const GreedySearchShared at(layout.num_books);
    const int head = static_cast<int>(blockIdx.y), group = static_cast<int>(blockIdx.z);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const Index books = (Index{head} * layout.num_groups + group) * keys.num_stages;
    const auto copied = [&](int stage) {
      return CopyBarrier(reinterpret_cast<std::uint64_t*>(shared + at.barriers) + stage % 2);
    };
    const auto stage_at = [&](int stage) {
      return shared + at.stages + stage % 2 * GreedySearchShared::kStageBytes;
    };
    const auto start_stage = [&](int stage) {
      if (thread != 0 || stage >= keys.num_stages) return;
      copied(stage).arrive_and_expect(GreedyStage::kBytes);
      copy_bytes(stage_at(stage), keys.greedy_stages + (books + stage) * GreedyStage::kBytes,
                 GreedyStage::kBytes, copied(stage));
    };
    if (thread == 0) {
      copied(0).init(1);
      copied(1).init(1);
      publish_barriers();
    }
    __syncthreads();
    start_stage(0);
    start_stage(1);

    const Index first_token = Index{blockIdx.x} * kGreedySearch.num_rows;
    const int count =
        static_cast<int>(min(Index{kGreedySearch.num_rows}, num_tokens - first_token));
    GreedyRows rows;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int row = warp * 16 + part * 8 + lane / 4;
      const float* const key =
          unit_keys +
          ((first_token + min(row, count - 1)) * layout.num_kv_heads + head) * layout.head_dim;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const float2 pair = *reinterpret_cast<const float2*>(key + n / 8 * (layout.head_dim / 2) +
                                                             group * 64 + n % 8 * 8 + lane % 4 * 2);
        rows.half[n / 8][n % 8][2 * part] = keys.residual_scale * pair.x;
        rows.half[n / 8][n % 8][2 * part + 1] = keys.residual_scale * pair.y;
      }
    }

    auto* const codes = reinterpret_cast<std::uint16_t*>(shared + at.codes);
    for (int stage = 0; stage < keys.num_stages; ++stage) {
      copied(stage).wait(stage / 2 % 2);
      const GreedySearch search{
          stage_at(stage),
          reinterpret_cast<std::uint32_t*>(shared + at.terms) + warp * 16 * kGreedyTermStride,
          keys.cross_terms + (books + stage) * GreedyStage::kSize * GreedyStage::kSize,
          keys.greedy_factor, lane};
      GreedyRows terms;
      search.compute_terms(rows, terms);
      std::uint32_t choices[2];
      search.choose(terms, choices);
      search.take_off(choices, rows);
      __syncthreads();  // the stage is no longer read
      start_stage(stage + 2);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        std::uint16_t* const of_row =
            codes + (warp * 16 + part * 8 + lane / 4) * at.codes_stride + 2 * stage;
        if (lane % 4 < 2)
          of_row[lane % 4] =
              static_cast<std::uint16_t>(lane % 4 == 0 ? a_of(choices[part]) : b_of(choices[part]));
      }
    }
    __syncwarp();  // a row's lanes have all written its codes
    const int own_count = min(count - warp * 16, 16);
    if (own_count <= 0) return;
    write_key_codes(
        layout, head, group, codes + warp * 16 * at.codes_stride, at.codes_stride,
        KeyTargets(layout, head, slot_mapping, norms, first_token + warp * 16, own_count), pages);
  }
}

}  // namespace commvq::cuda
