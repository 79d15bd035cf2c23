#include "attention/tile_kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/simd.hpp"

namespace commvq::attention {

using simd::ShortVec;
using simd::UnsignedShortVec;
using simd::Vec;

namespace {

constexpr int kLanes = simd::kLanes;

/// Adds up the rows of one token and group, `columns` columns of them: `rows` points at the first
/// row of the first book, whose books are `book_size` integers apart, `offsets` `[2 * num_stages]`
/// lead from the start of its book to the row of each code.
template <bool tied, int columns>
void sum_columns(const std::int16_t* rows, Index book_size, const std::uint32_t* offsets,
                 int num_stages, std::int16_t* real, std::int16_t* imag) {
  constexpr int kLine = KeyTables::kLanes;
  ShortVec sums[columns][2] = {};
  for (int stage = 0; stage < num_stages; ++stage) {
    const std::int16_t* const a = rows + offsets[2 * stage];
    if (!tied) rows += book_size;
    const std::int16_t* const b = rows + offsets[2 * stage + 1];
    rows += book_size;
    for (int c = 0; c < columns; ++c) {
      sums[c][0] += simd::load_shorts(a + 2 * c * kLine);
      sums[c][1] += simd::load_shorts(a + (2 * c + 1) * kLine);
      const ShortVec x = simd::load_shorts(b + 2 * c * kLine);
      const ShortVec y = simd::load_shorts(b + (2 * c + 1) * kLine);
      if (tied) {  // j (x + j y) = -y + j x
        sums[c][0] -= y;
        sums[c][1] += x;
      } else {
        sums[c][0] += x;
        sums[c][1] += y;
      }
    }
  }
  for (int c = 0; c < columns; ++c) {
    simd::store_shorts(real + c * kLine, sums[c][0]);
    simd::store_shorts(imag + c * kLine, sums[c][1]);
  }
}

/// One group's sums, `[count][2 * padded_pairs]`. Offsets of consecutive tokens lie
/// `offsets_stride` apart.
template <bool tied>
void sum_group(const KeyTables& tables, const std::int16_t* rows, int count,
               const std::uint32_t* offsets, int offsets_stride, std::int16_t* sums) {
  constexpr int kLine = KeyTables::kLanes;
  const int num_stages = tables.config().num_stages;
  const Index book_size = Index{tables.config().codebook_size} * tables.row_size();
  for (int t = 0; t < count; ++t, offsets += offsets_stride) {
    std::int16_t* const real = sums + t * tables.row_size();
    std::int16_t* const imag = real + tables.padded_pairs();
    int c = 0;
    for (; c + 2 <= tables.num_columns(); c += 2)
      sum_columns<tied, 2>(rows + 2 * c * kLine, book_size, offsets, num_stages, real + c * kLine,
                           imag + c * kLine);
    if (c < tables.num_columns())
      sum_columns<tied, 1>(rows + 2 * c * kLine, book_size, offsets, num_stages, real + c * kLine,
                           imag + c * kLine);
  }
}

template <class Load, class Source>
void rotate_by(Load load, const Source* planar, const float* rotation, float sign, int padded_pairs,
               float* rotated) {
  for (int i = 0; i < padded_pairs; i += kLanes) {
    const Vec re = load(planar + i);
    const Vec im = load(planar + padded_pairs + i);
    const Vec cosine = simd::load(rotation + i);
    const Vec sine = sign * simd::load(rotation + padded_pairs + i);
    simd::store(rotated + i, re * cosine - im * sine);
    simd::store(rotated + padded_pairs + i, re * sine + im * cosine);
  }
}

/// Scores of `rows` queries with `tokens` keys, sixteen in all: each load serves several products.
template <int rows, int tokens>
void score_block(const float* queries, const float* keys, int width, float* scores) {
  static_assert(rows * tokens == kLanes);
  Vec sums[kLanes] = {};
  for (int i = 0; i < width; i += kLanes) {
    Vec query[rows];
    for (int r = 0; r < rows; ++r) query[r] = simd::load(queries + r * width + i);
    for (int t = 0; t < tokens; ++t) {
      const Vec key = simd::load(keys + t * width + i);
      for (int r = 0; r < rows; ++r) sums[r * tokens + t] += query[r] * key;
    }
  }
  const Vec result = simd::sum_each(sums);
  for (int r = 0; r < rows; ++r)
    std::memcpy(scores + r * kTile, reinterpret_cast<const float*>(&result) + r * tokens,
                tokens * sizeof(float));
}

/// As `score_block`, rotating each key on the way.
template <int rows, int tokens>
void score_turning_block(const float* queries, const std::int16_t* keys, const float* rotations,
                         int padded_pairs, float* scores) {
  static_assert(rows * tokens == kLanes);
  const int width = 2 * padded_pairs;
  Vec sums[kLanes] = {};
  for (int i = 0; i < padded_pairs; i += kLanes) {
    Vec query_re[rows], query_im[rows];
    for (int r = 0; r < rows; ++r) {
      query_re[r] = simd::load(queries + r * width + i);
      query_im[r] = simd::load(queries + r * width + padded_pairs + i);
    }
    for (int t = 0; t < tokens; ++t) {
      const Vec re = simd::load_as_floats(keys + t * width + i);
      const Vec im = simd::load_as_floats(keys + t * width + padded_pairs + i);
      const Vec cosine = simd::load(rotations + t * width + i);
      const Vec sine = simd::load(rotations + t * width + padded_pairs + i);
      const Vec turned_re = re * cosine - im * sine;
      const Vec turned_im = re * sine + im * cosine;
      for (int r = 0; r < rows; ++r) {
        sums[r * tokens + t] += query_re[r] * turned_re;
        sums[r * tokens + t] += query_im[r] * turned_im;
      }
    }
  }
  const Vec result = simd::sum_each(sums);
  for (int r = 0; r < rows; ++r)
    std::memcpy(scores + r * kTile, reinterpret_cast<const float*>(&result) + r * tokens,
                tokens * sizeof(float));
}

/// Weights of the tokens of a tile in fixed point, as sums over subsets of four of them.
struct WeightTables {
  /// Lanes m and m + 16 of table k add up the weights 4k + i whose bit i is set in m.
  UnsignedShortVec subset_sums[kTile / 4];
  float unit;
};

/// Weights `[kTile]` in units of the result, rounded. The unit is chosen so that their sum, hence
/// any of them, does not overflow 16 bits.
float to_fixed_point(const float* weights, std::uint16_t* fixed) {
  constexpr float kShare = 1.0f / kTile;  // the sum of all weights might overflow
  Vec mean{};
  for (int t = 0; t < kTile; t += kLanes) mean += kShare * simd::load(weights + t);
  const double unit = double{simd::sum_of_lanes(mean)} * kTile / (65535 - kTile);
  // The inverse of the smallest units overflows, its root does not.
  const auto root = static_cast<float>(unit > 0 ? std::sqrt(1 / unit) : 0);
  for (int t = 0; t < kTile; t += kLanes)
    simd::store_as_shorts(fixed + t, simd::load(weights + t) * root * root + 0.5f);
  return static_cast<float>(unit);
}

WeightTables tables_of(const float* weights) {
  constexpr auto kAll = static_cast<std::uint16_t>(-1);
  constexpr auto mask = [](int bit) {
    UnsignedShortVec lanes{};
    for (int m = 0; m < 2 * kLanes; ++m) lanes[m] = (m >> bit & 1) != 0 ? kAll : 0;
    return lanes;
  };
  const UnsignedShortVec masks[4] = {mask(0), mask(1), mask(2), mask(3)};
  alignas(64) std::uint16_t fixed[kTile];
  WeightTables result;
  result.unit = to_fixed_point(weights, fixed);
  for (int k = 0; k < kTile / 4; ++k)
    result.subset_sums[k] = (masks[0] & fixed[4 * k]) + (masks[1] & fixed[4 * k + 1]) +
                            (masks[2] & fixed[4 * k + 2]) + (masks[3] & fixed[4 * k + 3]);
  return result;
}

/// Looks 32 code bits of `num_bytes` times eight tokens, from byte `first` of the tile on, up in
/// every row's tables.
template <int num_bytes>
void add_code_lanes(const std::uint8_t* bytes, Index bytes_stride, int first,
                    const WeightTables* tables, int rows, float* sums, Index stride) {
  UnsignedShortVec low[num_bytes];
  UnsignedShortVec high[num_bytes];
  for (int byte = 0; byte < num_bytes; ++byte) {
    low[byte] = simd::load_as_shorts(bytes + (first + byte) * bytes_stride);
    high[byte] = low[byte] >> 4;
  }
  for (int r = 0; r < rows; ++r) {
    const UnsignedShortVec* const subset_sums = tables[r].subset_sums + 2 * first;
    UnsignedShortVec sum{};
    UnsignedShortVec other_sum{};
    for (int byte = 0; byte < num_bytes; ++byte) {
      sum += simd::lookup(subset_sums[2 * byte], low[byte]);
      other_sum += simd::lookup(subset_sums[2 * byte + 1], high[byte]);
    }
    sum += other_sum;
    float* const to = sums + r * stride;
    simd::store(to, simd::load(to) + tables[r].unit * simd::half_as_floats<0>(sum));
    simd::store(to + kLanes,
                simd::load(to + kLanes) + tables[r].unit * simd::half_as_floats<1>(sum));
  }
}

/// `vectors` registers full of columns of `rows` rows.
template <int rows, int vectors>
void add_decoded_block(const float* decoder, Index decoder_stride, Index num_code_bits,
                       const float* codes, Index codes_stride, float* sums, Index stride) {
  Vec block[rows][vectors];
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) block[r][v] = simd::load(sums + r * stride + v * kLanes);
  for (Index i = 0; i < num_code_bits; ++i)
    for (int v = 0; v < vectors; ++v) {
      const Vec column = simd::load(decoder + i * decoder_stride + v * kLanes);
      for (int r = 0; r < rows; ++r) block[r][v] += codes[r * codes_stride + i] * column;
    }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) simd::store(sums + r * stride + v * kLanes, block[r][v]);
}

template <int rows>
void add_decoded_of(const float* decoder, Index decoder_stride, Index num_code_bits, int head_dim,
                    const float* codes, Index codes_stride, float* sums, Index stride) {
  int d = 0;
  for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes)
    add_decoded_block<rows, 4>(decoder + d, decoder_stride, num_code_bits, codes, codes_stride,
                               sums + d, stride);
  for (; d + kLanes <= head_dim; d += kLanes)
    add_decoded_block<rows, 1>(decoder + d, decoder_stride, num_code_bits, codes, codes_stride,
                               sums + d, stride);
  for (; d < head_dim; ++d)
    for (int r = 0; r < rows; ++r)
      for (Index i = 0; i < num_code_bits; ++i)
        sums[r * stride + d] += codes[r * codes_stride + i] * decoder[i * decoder_stride + d];
}

/// Adds up the values of a tile for `rows` rows: each load serves all of them.
template <int rows>
void add_values_of(const float* values, int count, int width, const float* weights, float* sums,
                   Index stride) {
  for (int i = 0; i < width; i += kLanes) {
    Vec block[rows];
    for (int r = 0; r < rows; ++r) block[r] = simd::load(sums + r * stride + i);
    for (int t = 0; t < count; ++t) {
      const Vec value = simd::load(values + t * width + i);
      for (int r = 0; r < rows; ++r) block[r] += weights[r * kTile + t] * value;
    }
    for (int r = 0; r < rows; ++r) simd::store(sums + r * stride + i, block[r]);
  }
}

}  // namespace

void unpack_codes(const std::uint8_t* stream, int width, Index count, std::uint16_t* codes) {
  const std::uint64_t mask = (std::uint64_t{1} << width) - 1;
  Index i = 0;
  if (width < 8) {  // eight codes are whole bytes, and fit a word
    using Words = std::uint64_t __attribute__((vector_size(64)));
    using Codes = std::uint16_t __attribute__((vector_size(16)));
    Words shifts;
    for (int k = 0; k < 8; ++k) shifts[k] = static_cast<std::uint64_t>(k * width);
    for (; i + 8 <= count; i += 8) {
      std::uint64_t word;
      std::memcpy(&word, stream + i / 8 * width, sizeof(word));
      const Codes eight = __builtin_convertvector(((Words{} + word) >> shifts) & mask, Codes);
      std::memcpy(codes + i, &eight, sizeof(eight));
    }
  }
  for (; i < count; ++i) {
    std::uint32_t window;
    std::memcpy(&window, stream + i * width / 8, sizeof(window));
    codes[i] = static_cast<std::uint16_t>((window >> (i * width % 8)) & mask);
  }
}

void sum_rows(const KeyTables& tables, int head, const std::uint16_t* codes, int count,
              int padded_head_pairs, std::int16_t* planar, RowScratch& scratch) {
  const KeyCodecConfig& config = tables.config();
  const int padded_pairs = tables.padded_pairs();
  scratch.offsets.resize(static_cast<std::size_t>(count * config.num_codes()));
  std::uint32_t* const offsets = scratch.offsets.data();
  const auto row_size = static_cast<std::uint32_t>(tables.row_size());
#pragma omp simd
  for (int i = 0; i < count * config.num_codes(); ++i) offsets[i] = codes[i] * row_size;
  const auto sum = [&](int group, std::int16_t* sums) {
    const auto kernel = config.tied ? sum_group<true> : sum_group<false>;
    kernel(tables, tables.group(head, group), count, offsets + group * config.num_stages * 2,
           config.num_codes(), sums);
  };
  if (config.num_groups() == 1 && padded_pairs == padded_head_pairs) return sum(0, planar);

  scratch.sums.resize(static_cast<std::size_t>(count * 2 * padded_pairs));
  const auto bytes = static_cast<std::size_t>(config.group_pairs) * sizeof(std::int16_t);
  for (int group = 0; group < config.num_groups(); ++group) {
    sum(group, scratch.sums.data());
    for (int t = 0; t < count; ++t) {
      const std::int16_t* const from = scratch.sums.data() + t * 2 * padded_pairs;
      std::int16_t* const real = planar + t * 2 * padded_head_pairs + group * config.group_pairs;
      std::memcpy(real, from, bytes);
      std::memcpy(real + padded_head_pairs, from + padded_pairs, bytes);
    }
  }
}

void rotate(const float* planar, const float* rotation, int padded_pairs, float* rotated) {
  rotate_by(simd::load, planar, rotation, 1.0f, padded_pairs, rotated);
}

void rotate(const std::int16_t* planar, const float* rotation, int padded_pairs, float* rotated) {
  rotate_by(simd::load_as_floats, planar, rotation, 1.0f, padded_pairs, rotated);
}

void rotate_back(const float* planar, const float* rotation, int padded_pairs, float* rotated) {
  rotate_by(simd::load, planar, rotation, -1.0f, padded_pairs, rotated);
}

void score_subtile(const float* queries, int rows, const float* keys, int width, float* scores) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    for (int t = 0; t < kSubtile; t += 4)
      score_block<4, 4>(queries + r * width, keys + t * width, width, scores + r * kTile + t);
  for (; r < rows; ++r)
    score_block<1, kSubtile>(queries + r * width, keys, width, scores + r * kTile);
}

void score_turning_subtile(const float* queries, int rows, const std::int16_t* keys,
                           const float* rotations, int padded_pairs, float* scores) {
  const int width = 2 * padded_pairs;
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    for (int t = 0; t < kSubtile; t += 4)
      score_turning_block<4, 4>(queries + r * width, keys + t * width, rotations + t * width,
                                padded_pairs, scores + r * kTile + t);
  for (; r < rows; ++r)
    score_turning_block<1, kSubtile>(queries + r * width, keys, rotations, padded_pairs,
                                     scores + r * kTile);
}

void add_code_bits(const std::uint8_t* bytes, Index byte_stride, int num_bytes, Index num_code_bits,
                   const float* weights, int rows, float* sums, Index stride) {
  constexpr int kRowsAtATime = 4;  // whose tables stay in the first cache level
  WeightTables tables[kRowsAtATime];
  for (int first = 0; first < rows; first += kRowsAtATime) {
    const int count = std::min(kRowsAtATime, rows - first);
    for (int r = 0; r < count; ++r) tables[r] = tables_of(weights + (first + r) * kTile);
    float* const to = sums + first * stride;
    for (Index i = 0; i < num_code_bits; i += kCodeLanes) {
      if (num_bytes == kTile / 8) {
        add_code_lanes<kTile / 8>(bytes + i, byte_stride, 0, tables, count, to + i, stride);
        continue;
      }
      for (int byte = 0; byte < num_bytes; ++byte)
        add_code_lanes<1>(bytes + i, byte_stride, byte, tables, count, to + i, stride);
    }
  }
}

void add_decoded(const float* decoder, Index decoder_stride, Index num_code_bits, int head_dim,
                 const float* codes, Index codes_stride, int rows, float* sums, Index stride) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    add_decoded_of<4>(decoder, decoder_stride, num_code_bits, head_dim, codes + r * codes_stride,
                      codes_stride, sums + r * stride, stride);
  for (; r < rows; ++r)
    add_decoded_of<1>(decoder, decoder_stride, num_code_bits, head_dim, codes + r * codes_stride,
                      codes_stride, sums + r * stride, stride);
}

void add_values(const float* values, int count, int width, const float* weights, int rows,
                float* sums, Index stride) {
  int r = 0;
  for (; r + 8 <= rows; r += 8)
    add_values_of<8>(values, count, width, weights + r * kTile, sums + r * stride, stride);
  for (; r < rows; ++r)
    add_values_of<1>(values, count, width, weights + r * kTile, sums + r * stride, stride);
}

}  // namespace commvq::attention
