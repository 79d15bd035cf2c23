#pragma once

#include "common/sort_key.cuh"
#include "instructions.cuh"
#include "load_tokens.cuh"
#include "search_stage.hpp"

namespace commvq::cuda {

inline constexpr int kSearchSize = SearchStage<true>::kSize;

// What searches for key codes share where warpgroups multiply: books of 64 centroids over 64 pairs.
// A warp has 16 residuals ("rows") in registers, as the matrix instruction wants and gives them:
// lane 4g + t has of rows g and g + 8 numbers 8 n + 2 t and the next one. Per stage
// 1. inner products of the rows with the books give the terms of a and of b (see key_search.cuh);
//    of tied books, Z_1 = j Z_0, those with the second one are of the first one and rows times -j;
// 2. in 16-bit integers, for each b the least sum of a term of a and a cross term, all b of a lane
//    at a time, so that all rows of the warp need the same a together;
// 3. the b that may be the best within the integers' rounding, and of these the a: in a greedy
//    search mostly one each; where there are more, they are compared in fp32;
// 4. a matrix product takes the chosen centroids off the rows.

/// Real and imaginary parts of residuals, or terms of a and of b: [eight columns at a time][row g:
/// two columns, row g + 8: the same].
struct SearchRows {
  float half[2][8][4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 64; ++i) half[i / 32][i / 4 % 8][i % 4] = 0;
  }
};

/// A key's numbers of one group, scaled, as row g or g + 8 of the warp. Returns the lane's share of
/// the squared norm before.
__device__ __forceinline__ float load_row(SearchRows& rows, int part, const float* key,
                                          int head_dim, int group, float scale) {
  float squares = 0;
#pragma unroll
  for (int n = 0; n < 16; ++n) {
    const float2 pair =
        *reinterpret_cast<const float2*>(key + n / 8 * (head_dim / 2) + group * 64 + n % 8 * 8 +
                                         static_cast<int>(threadIdx.x) % 4 * 2);
    squares += pair.x * pair.x + pair.y * pair.y;
    rows.half[n / 8][n % 8][2 * part] = scale * pair.x;
    rows.half[n / 8][n % 8][2 * part + 1] = scale * pair.y;
  }
  return squares;
}

/// Numbers between rows of a warp's terms of a in shared memory: no two rows share a bank.
inline constexpr int kSearchTermStride = kSearchSize + 4;

/// The row's least value of four lanes, which is a row.
template <class T>
__device__ __forceinline__ T row_least(T value) {
  value = min(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return min(value, __shfl_xor_sync(0xffffffffu, value, 2));
}
template <class T>
__device__ __forceinline__ T row_sum(T value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

/// Takes the first column out of a row's set, of which each lane has its own columns: bit n is
/// column 8 n + 2 t, bit n + 16 the next one. 64: the set is empty.
__device__ __forceinline__ int take_column(unsigned& mask) {
  const int first = static_cast<int>(threadIdx.x) % 4 * 2;
  const int even = __ffs(static_cast<int>(mask & 0xffffu)) - 1;
  const int odd = __ffs(static_cast<int>(mask >> 16)) - 1;
  const int own =
      min(even >= 0 ? even * 8 + first : kSearchSize, odd >= 0 ? odd * 8 + first + 1 : kSearchSize);
  const int column = row_least(own);
  if (own == column && column < kSearchSize) mask &= ~(1u << (column / 8 + column % 2 * 16));
  return column;
}

/// One warp's search of one stage.
template <bool kTied>
struct WarpgroupSearch {
  using Stage = SearchStage<kTied>;

  const unsigned char* stage;  ///< Stage in shared memory
  std::uint32_t* terms_of_a;   ///< the warp's rows
  const float* cross_terms;    ///< fp32, [a][b]
  float product_factor;        ///< scaled product -> -2 <row, centroid>
  int lane;
  int num_stages;  ///< of the codec, for `compute_no_sooner` alone

  __device__ float unit() const { return *reinterpret_cast<const float*>(stage + Stage::kUnit); }
  /// The lane's rows g and g + 8 are neighbours: what its half warp writes shares no bank.
  __device__ std::uint32_t* row_of_terms(int part) const {
    return terms_of_a + (lane / 4 * 2 + part) * kSearchTermStride;
  }

  /// Step 1. Operands are made of kStepsAtOnce of the eight steps at a time, sixteen numbers each.
  template <int kStepsAtOnce>
  __device__ void compute_terms(const SearchRows& rows, SearchRows& terms) const {
    using namespace append_instructions;
    const std::uint64_t centroids = operand_descriptor(stage);
    terms.clear();
    settle_sums(terms.half[0]);
    settle_sums(terms.half[1]);
#pragma unroll
    for (int first = 0; first < 8; first += kStepsAtOnce) {
      compute_no_sooner(first >= num_stages + 8);
      std::uint32_t hi[kStepsAtOnce][4], lo[kStepsAtOnce][4];
#pragma unroll
      for (int i = 0; i < 4 * kStepsAtOnce; ++i) {
        const int step = i / 4, k = i % 4;
        // Row g, row g + 8; the same of the next eight columns.
        const float* const pair =
            rows.half[(first + step) / 4][2 * ((first + step) % 4) + k / 2] + k % 2 * 2;
        hi[step][k] = pack_halves(pair[0], pair[1]);
        lo[step][k] = pack_rests(pair[0], pair[1], hi[step][k]);
      }
      begin_warpgroup_products();
#pragma unroll
      for (int step = 0; step < kStepsAtOnce; ++step) {
        const int half = (first + step) / 4;
        const auto multiply = [&](auto sign, float(&sums)[8][4], int book, int of_centroid) {
          const std::uint64_t high =
              advanced(centroids, book * Stage::kBookBytes + of_centroid * Stage::kHalfBytes +
                                      (first + step) % 4 * 32);
          warpgroup_multiply_add<sign.value, 0>(sums, hi[step], high);
          warpgroup_multiply_add<sign.value, 0>(sums, hi[step], advanced(high, Stage::kPartBytes));
          warpgroup_multiply_add<sign.value, 0>(sums, lo[step], high);
        };
        constexpr std::integral_constant<int, 1> kPlus;
        constexpr std::integral_constant<int, -1> kMinus;
        multiply(kPlus, terms.half[0], 0, half);
        // <r, j z> = <im r, re z> - <re r, im z>
        if (!kTied) {
          multiply(kPlus, terms.half[1], 1, half);
        } else if (half == 0) {
          multiply(kMinus, terms.half[1], 0, 1);
        } else {
          multiply(kPlus, terms.half[1], 0, 0);
        }
      }
      commit_warpgroup_products();
      finish_warpgroup_products(terms.half[0]);
      finish_warpgroup_products(terms.half[1]);
    }
    const auto* const norms = reinterpret_cast<const float2*>(stage + Stage::kNorms);
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int book = 0; book < 2; ++book) {
        const float2 norm = norms[(kTied ? 0 : book) * 32 + n * 4 + lane % 4];  // |j z| = |z|
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float& term = terms.half[book][n][k];
          term = (k % 2 == 0 ? norm.x : norm.y) + term * product_factor;
        }
      }
  }

  /// Writes a row's terms of a, less the least one, as integers. Returns the least.
  __device__ float write_terms_of_a(const SearchRows& terms, int part, float per_unit) const {
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
    }
    return least;
  }
  /// Minus the lane's integers of a row, two a word.
  __device__ void read_negated_terms_of_a(int part, std::uint32_t (&negated)[8]) const {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const uint2 two = *reinterpret_cast<const uint2*>(row_of_terms(part) + n * 8 + lane % 4 * 2);
      negated[n] = (-two.x & 0xffffu) | -two.y << 16;  // both halves of either are the same
    }
  }

  /// Step 2: of both rows and the lane's b, two a word, the least sums over all a.
  __device__ void least_sums(std::uint32_t (&least)[2][8]) const {
    using namespace append_instructions;
#pragma unroll
    for (int n = 0; n < 8; ++n) least[0][n] = least[1][n] = 0x7fff7fffu;
    const unsigned char* const cross = stage + Stage::kCrossTerms;
#pragma unroll 1
    for (int first = 0; first < Stage::kSize; first += 8) {
#pragma unroll
      for (int four = 0; four < 8; four += 4) {
        const uint4 of_a[2] = {*reinterpret_cast<const uint4*>(row_of_terms(0) + first + four),
                               *reinterpret_cast<const uint4*>(row_of_terms(1) + first + four)};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          // `first` does not change the place of a's pieces among each other.
          const unsigned char* const of_k = cross + first * 128;
          const uint4 low =
              *reinterpret_cast<const uint4*>(of_k + Stage::cross_piece(four + k, 0, lane % 4));
          const uint4 high =
              *reinterpret_cast<const uint4*>(of_k + Stage::cross_piece(four + k, 1, lane % 4));
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
  __device__ unsigned candidates_b(const SearchRows& terms, const std::uint32_t (&least)[8],
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

  /// Minus the lane's sums of terms of a and cross terms beside b, two a word. Returns the largest.
  __device__ int minus_sums(const std::uint32_t (&negated)[8], int b,
                            std::uint32_t (&sums)[8]) const {
    using namespace append_instructions;
    const unsigned char* const cross = stage + Stage::kMinusByB;
    const uint4 low = *reinterpret_cast<const uint4*>(cross + Stage::cross_piece(b, 0, lane % 4));
    const uint4 high = *reinterpret_cast<const uint4*>(cross + Stage::cross_piece(b, 1, lane % 4));
    const std::uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    std::uint32_t largest = kLeastPair;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      sums[n] = add_max_pairs(words[n], negated[n], kLeastPair);
      largest = add_max_pairs(sums[n], 0, largest);
    }
    return max(static_cast<int>(static_cast<std::int16_t>(largest)),
               static_cast<int>(static_cast<std::int16_t>(largest >> 16)));
  }
  /// The columns whose sums are at most `most`: where minus the sum and `most` is not negative.
  __device__ static unsigned columns_within(const std::uint32_t (&minus_sums)[8], int most) {
    using namespace append_instructions;
    const std::uint32_t pair = (static_cast<std::uint32_t>(most) & 0xffffu) * 0x10001u;
    unsigned mask = 0;
#pragma unroll
    for (int n = 0; n < 8; ++n)
      mask |= (~add_max_pairs(minus_sums[n], pair, kLeastPair) >> 15 & 0x10001u) << n;
    return mask;
  }
  static constexpr std::uint32_t kLeastPair = 0x80008000u;

  /// The lane's a of a row that may be the best ones beside b: of two sums, four numbers are
  /// rounded.
  __device__ unsigned candidates_a(const std::uint32_t (&negated)[8], int b) const {
    std::uint32_t sums[8];
    const int largest = minus_sums(negated, b, sums);
    return columns_within(sums, 2 + row_least(-largest));
  }

  /// A row's term of a anew, for all its lanes: it is seldom needed, and takes registers to keep.
  __device__ float term_of_a(const SearchRows& rows, int part, int a) const {
    using namespace append_instructions;
    const auto two = [&](int half, int n, int of_part) {
      const int at = Stage::operand(a, half * 64 + n * 8) + of_part * Stage::kPartBytes;
      const auto pair = *reinterpret_cast<const std::uint32_t*>(stage + at + lane % 4 * 4);
      return float2{from_half(static_cast<std::uint16_t>(pair)),
                    from_half(static_cast<std::uint16_t>(pair >> 16))};
    };
    float product = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float2 high = two(half, n, 0), low = two(half, n, 1);
        product += rows.half[half][n][2 * part] * (high.x + low.x) +
                   rows.half[half][n][2 * part + 1] * (high.y + low.y);
      }
    const float norm = reinterpret_cast<const float*>(stage + Stage::kNorms)[a];
    return norm + row_sum(product) * product_factor;
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
  __device__ std::uint32_t compare(const SearchRows& rows, const SearchRows& terms,
                                   const std::uint32_t (&negated)[8], int part,
                                   unsigned mask_b) const {
    SortKey best = kLastKey;
    while (__ballot_sync(0xffffffffu, mask_b != 0) != 0) {
      const int b = take_column(mask_b);
      const bool has_b = b < Stage::kSize;
      unsigned mask_a = candidates_a(negated, has_b ? b : 0);
      if (!has_b) mask_a = 0;
      while (__ballot_sync(0xffffffffu, mask_a != 0) != 0) {
        const int a = take_column(mask_a);
        const bool has_a = a < Stage::kSize;
        const float of_a = term_of_a(rows, part, has_a ? a : 0);
        const float of_b = term_of(terms.half[1], part, has_b ? b : 0);
        if (!has_a) continue;
        const float cross = __ldg(cross_terms + a * kSearchSize + b);
        const SortKey key = sort_key(of_a + (of_b + cross), 0, a, b);
        best = key < best ? key : best;
      }
    }
    return static_cast<std::uint32_t>(best);
  }

  /// Step 2 and what it needs.
  __device__ void prepare(const SearchRows& terms, float (&least_of_a)[2],
                          std::uint32_t (&least)[2][8]) const {
    const float per_unit = unit() > 0 ? 1 / unit() : 0;
    least_of_a[0] = write_terms_of_a(terms, 0, per_unit);
    least_of_a[1] = write_terms_of_a(terms, 1, per_unit);
    __syncwarp();
    least_sums(least);
  }

  /// Steps 2 and 3: the choices of both rows, as in a sort key. Where nothing compares (NaN), any.
  __device__ void choose(const SearchRows& rows, const SearchRows& terms,
                         std::uint32_t (&choices)[2]) const {
    std::uint32_t negated[8], least[2][8];
    float least_of_a[2];
    prepare(terms, least_of_a, least);
    unsigned masks_b[2];
    bool is_clear = true;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      masks_b[part] = candidates_b(terms, least[part], part, least_of_a[part]);
      unsigned left = masks_b[part];
      const int b = take_column(left) % Stage::kSize;
      read_negated_terms_of_a(part, negated);
      unsigned mask_a = candidates_a(negated, b);
      const int count = row_sum(__popc(masks_b[part]) * 256 + __popc(mask_a));
      is_clear = is_clear && count == 257;
      choices[part] = static_cast<std::uint32_t>(take_column(mask_a) << 14 | b);
    }
    if (__all_sync(0xffffffffu, is_clear)) return;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      read_negated_terms_of_a(part, negated);
      choices[part] = compare(rows, terms, negated, part, masks_b[part]) & (63u << 14 | 63u);
    }
  }

  /// Step 4.
  __device__ void take_off(const std::uint32_t (&choices)[2], SearchRows& rows) const {
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
      const std::uint64_t real = advanced(centroids, i % 2 * Stage::kPartBytes + i / 2 * 16 * 128);
      const std::uint64_t imaginary = advanced(real, Stage::kHalfBytes);
      warpgroup_multiply_add<-1, 1>(rows.half[0], of_a[i / 2], real);
      warpgroup_multiply_add<-1, 1>(rows.half[1], of_a[i / 2], imaginary);
      if constexpr (kTied) {  // j z = -im z + j re z
        warpgroup_multiply_add<1, 1>(rows.half[0], of_b[i / 2], imaginary);
        warpgroup_multiply_add<-1, 1>(rows.half[1], of_b[i / 2], real);
      } else {
        warpgroup_multiply_add<-1, 1>(rows.half[0], of_b[i / 2], advanced(real, Stage::kBookBytes));
        warpgroup_multiply_add<-1, 1>(rows.half[1], of_b[i / 2],
                                      advanced(imaginary, Stage::kBookBytes));
      }
    }
    commit_warpgroup_products();
    finish_warpgroup_products(rows.half[0]);
    finish_warpgroup_products(rows.half[1]);
  }
};

}  // namespace commvq::cuda
