#include "commvq/cuda/integer_codebook.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "commvq/core/float16.hpp"

namespace commvq::cuda {
namespace {

/// The largest sum of one row a book.
constexpr double kLargestSum = 127;
/// Integers up to so many have an exact 1152 - offset in fp16.
constexpr double kLargestOffset = 896;

/// One book's column of a channel, less its mean, and the mean.
struct Column {
  std::vector<double> values;
  double mean = 0;
  double largest = 0;

  Column(const float* first, int count, int stride) {
    for (int c = 0; c < count; ++c) mean += first[c * stride];
    mean /= count;
    for (int c = 0; c < count; ++c) {
      values.push_back(first[c * stride] - mean);
      largest = std::max(largest, std::abs(values.back()));
    }
  }
};

}  // namespace

int slice_width(const KeyCodecConfig& config) {
  return config.group_pairs > 32 ? 64 : 32;
}

IntegerKeySlice::IntegerKeySlice(const KeyCodebook<float>& codebook, const KeyPlane& plane,
                                 int first_pair, int num_pairs, int width_)
    : width(width_),
      num_books(plane.num_books),
      codebook_size(codebook.config.codebook_size),
      rows(static_cast<std::size_t>(num_books) * codebook_size * 2 * width),
      offsets(2 * static_cast<std::size_t>(width)),
      units(static_cast<std::size_t>(width)) {
  const int g = codebook.config.group_pairs;
  const int first_in_group = first_pair - plane.group * g;
  for (int i = 0; i < num_pairs; ++i) {
    std::vector<Column> columns[2];
    double bound = 0;  // the larger part's
    double means[2] = {};
    for (int part = 0; part < 2; ++part) {
      double sum = 0;
      for (int book = 0; book < num_books; ++book) {
        const int b = plane.first_book + book;
        columns[part].emplace_back(
            codebook.book(plane.group, b / 2, b % 2) + part * g + first_in_group + i, codebook_size,
            2 * g);
        sum += columns[part].back().largest;
        means[part] += columns[part].back().mean;
      }
      bound = std::max(bound, sum);
    }
    // Rounding adds half a unit a book, and half a unit of the means' rest.
    const double largest_mean = std::max(std::abs(means[0]), std::abs(means[1]));
    const double unit = std::max(bound / (kLargestSum - 0.5 * (num_books + 1)),
                                 largest_mean / (kLargestOffset - 1));
    units[static_cast<std::size_t>(i)] = static_cast<float>(unit);
    if (unit == 0) continue;
    for (int part = 0; part < 2; ++part) {
      const double offset = std::nearbyint(means[part] / unit);
      const double rest = means[part] / unit - offset;
      offsets[static_cast<std::size_t>(part * width + i)] = static_cast<std::int16_t>(offset);
      for (int book = 0; book < num_books; ++book)
        for (int c = 0; c < codebook_size; ++c) {
          const double value =
              columns[part][static_cast<std::size_t>(book)].values[static_cast<std::size_t>(c)] /
              unit;
          rows[(static_cast<std::size_t>(book * codebook_size + c) * 2 + part) * width + i] =
              static_cast<std::int16_t>(std::nearbyint(value + (book == 0 ? rest : 0.0)));
        }
    }
  }
}

Index IntegerKeySlice::image_bytes(int width, int num_books, int codebook_size) {
  const int books_per_line = 64 / width;
  return Index{(num_books + books_per_line - 1) / books_per_line} * codebook_size * 128;
}

std::vector<std::int8_t> IntegerKeySlice::image() const {
  const int books_per_line = 64 / width;
  std::vector<std::int8_t> bytes(
      static_cast<std::size_t>(image_bytes(width, num_books, codebook_size)));
  for (int book = 0; book < num_books; ++book)
    for (int c = 0; c < codebook_size; ++c) {
      std::int8_t* const row =
          bytes.data() + (static_cast<Index>(book / books_per_line) * codebook_size + c) * 128 +
          book % books_per_line * 64;
      const std::int16_t* const source =
          &rows[static_cast<std::size_t>(book * codebook_size + c) * 2 * width];
      // Four integers of one word add up as one: byte i carries what bytes below it borrow.
      for (int k = 0; k < width / 8; ++k)
        for (int q = 0; q < 4; ++q) {
          std::int32_t word = 0;
          for (int byte = 3; byte >= 0; --byte)
            word = word * 256 + source[byte / 2 * width + 8 * k + 2 * q + byte % 2];
          std::int8_t* const target = row + (k / 4 * 4 + q) * 16 + k % 4 * 4;
          for (int byte = 0; byte < 4; ++byte)
            target[byte] = static_cast<std::int8_t>(static_cast<std::uint32_t>(word) >> (8 * byte));
        }
    }
  return bytes;
}

std::vector<std::uint16_t> IntegerKeySlice::zero_points() const {
  std::vector<std::uint16_t> result;
  for (int k = 0; k < width / 8; ++k)
    for (int q = 0; q < 4; ++q)
      for (int part = 0; part < 2; ++part)
        for (int e = 0; e < 2; ++e)
          result.push_back(to_fp16(
              1152.0f - offsets[static_cast<std::size_t>(part * width + 8 * k + 2 * q + e)]));
  return result;
}

KeyCodec rounded_to_integers(const KeyCodec& codec, const DevicePageLayout& layout) {
  const KeyCodecConfig& config = codec.config();
  const int g = config.group_pairs;
  const int width = slice_width(config);
  std::vector<KeyCodebook<float>> rounded;
  for (int head = 0; head < codec.num_kv_heads(); ++head) {
    KeyCodebook<float> codebook = codec.codebook(head);
    codebook.config.tied = false;  // the halves are rounded apart
    for (int p = 0; p < layout.num_planes; ++p)
      for (int first = 0; first < g; first += width) {
        const KeyPlane& plane = layout.planes[p];
        const int num_pairs = std::min(width, g - first);
        const IntegerKeySlice slice(codec.codebook(head), plane, plane.group * g + first, num_pairs,
                                    width);
        for (int book = 0; book < plane.num_books; ++book)
          for (int c = 0; c < config.codebook_size; ++c)
            for (int part = 0; part < 2; ++part)
              for (int i = 0; i < num_pairs; ++i) {
                const int b = plane.first_book + book;
                const std::size_t at =
                    (static_cast<std::size_t>(book * config.codebook_size + c) * 2 + part) * width +
                    i;
                const int offset =
                    book == 0 ? slice.offsets[static_cast<std::size_t>(part * width + i)] : 0;
                codebook.book(plane.group, b / 2, b % 2)[c * 2 * g + part * g + first + i] =
                    static_cast<float>(slice.rows[at] + offset) *
                    slice.units[static_cast<std::size_t>(i)];
              }
      }
    rounded.push_back(std::move(codebook));
  }
  return KeyCodec(std::move(rounded));
}

}  // namespace commvq::cuda
