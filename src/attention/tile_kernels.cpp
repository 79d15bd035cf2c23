#include "attention/tile_kernels.hpp"

#include <cstring>

#include "attention/simd.hpp"

namespace commvq::attention {

using simd::IntVec;
using simd::ShortVec;
using simd::Vec;

namespace {

constexpr int kLanes = simd::kLanes;

/// Sums `vectors` registers full of every row: `rows` points at the first of them.
template <int vectors>
void sum_columns(const std::int16_t* rows, const KeyTables& tables, const std::uint16_t* codes,
                 std::int16_t* sum) {
  const Index row_size = tables.row_size();
  const Index book_size = tables.config().codebook_size * row_size;
  const int num_books = tables.config().num_stages * 2;
  ShortVec sums[vectors] = {};
  for (int book = 0; book < num_books; ++book) {
    const std::int16_t* const row = rows + book * book_size + codes[book] * row_size;
    for (int v = 0; v < vectors; ++v) sums[v] += simd::load_shorts(row + v * KeyTables::kLanes);
  }
  for (int v = 0; v < vectors; ++v) simd::store_shorts(sum + v * KeyTables::kLanes, sums[v]);
}

void sum_group(const std::int16_t* rows, const KeyTables& tables, const std::uint16_t* codes,
               std::int16_t* sum) {
  const int vectors = tables.row_size() / KeyTables::kLanes;
  int done = 0;
  for (; done + 4 <= vectors; done += 4)
    sum_columns<4>(rows + done * KeyTables::kLanes, tables, codes, sum + done * KeyTables::kLanes);
  for (; done < vectors; ++done)
    sum_columns<1>(rows + done * KeyTables::kLanes, tables, codes, sum + done * KeyTables::kLanes);
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

/// The sums over all 16 subsets of four weights: lane m adds those whose bit is set in m.
Vec subset_sums(const float* weights) {
  constexpr Vec kBit[4] = {{0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1},
                           {0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1},
                           {0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1},
                           {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1}};
  return (kBit[0] * weights[0] + kBit[1] * weights[1]) +
         (kBit[2] * weights[2] + kBit[3] * weights[3]);
}

template <int rows>
void add_code_bits_of(const std::uint8_t* bytes, Index num_code_bits, const float* weights,
                      float* sums, Index stride) {
  Vec low[rows];
  Vec high[rows];
  for (int r = 0; r < rows; ++r) {
    low[r] = subset_sums(weights + r * kTile);
    high[r] = subset_sums(weights + r * kTile + 4);
  }
  for (Index i = 0; i < num_code_bits; i += kLanes) {
    const IntVec bits = simd::load_as_ints(bytes + i);
    const IntVec high_bits = bits >> 4;
    for (int r = 0; r < rows; ++r) {
      float* const sum = sums + r * stride + i;
      simd::store(
          sum, simd::load(sum) + (simd::lookup(low[r], bits) + simd::lookup(high[r], high_bits)));
    }
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

}  // namespace

void unpack_codes(const std::uint8_t* stream, Index position, int width, int count,
                  std::uint16_t* codes) {
  const std::uint32_t mask = (1u << width) - 1u;
  for (int i = 0; i < count; ++i, position += width) {
    std::uint32_t window;
    std::memcpy(&window, stream + position / 8, sizeof(window));
    codes[i] = static_cast<std::uint16_t>((window >> (position % 8)) & mask);
  }
}

void sum_rows(const KeyTables& tables, int head, const std::uint16_t* codes, int padded_head_pairs,
              std::int16_t* planar) {
  const KeyCodecConfig& config = tables.config();
  if (config.num_groups() == 1) {
    sum_group(tables.group(head, 0), tables, codes, planar);
    return;
  }
  alignas(64) std::int16_t sum[2 * 512 + 2 * KeyTables::kLanes];
  const auto bytes = static_cast<std::size_t>(config.group_pairs) * sizeof(std::int16_t);
  for (int group = 0; group < config.num_groups(); ++group) {
    sum_group(tables.group(head, group), tables, codes + group * config.num_stages * 2, sum);
    std::int16_t* const real = planar + group * config.group_pairs;
    std::memcpy(real, sum, bytes);
    std::memcpy(real + padded_head_pairs, sum + tables.padded_pairs(), bytes);
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
  for (int r = 0; r < rows; ++r) {
    Vec sums[kSubtile] = {};
    for (int i = 0; i < width; i += kLanes) {
      const Vec query = simd::load(queries + r * width + i);
      for (int t = 0; t < kSubtile; ++t) sums[t] += query * simd::load(keys + t * width + i);
    }
    simd::store(scores + r * kTile, simd::sum_each(sums));
  }
}

void add_code_bits(const std::uint8_t* bytes, Index num_code_bits, const float* weights, int rows,
                   float* sums, Index stride) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    add_code_bits_of<4>(bytes, num_code_bits, weights + r * kTile, sums + r * stride, stride);
  for (; r < rows; ++r)
    add_code_bits_of<1>(bytes, num_code_bits, weights + r * kTile, sums + r * stride, stride);
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
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < width; i += kLanes) {
      Vec sum = simd::load(sums + r * stride + i);
      for (int t = 0; t < count; ++t)
        sum += weights[r * kTile + t] * simd::load(values + t * width + i);
      simd::store(sums + r * stride + i, sum);
    }
}

}  // namespace commvq::attention
