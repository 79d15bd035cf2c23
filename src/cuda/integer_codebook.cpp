#include "commvq/cuda/integer_codebook.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "commvq/core/float16.hpp"

namespace commvq::cuda {
namespace {

/// Books whose rows come in two parts where those of a plane's first stage do.
constexpr int kSplitBooks = 2;

/// The largest sum of one row a book, in units.
double largest_sum(int row_bits) {
  return row_bits == 4 ? 255 : 127;
}
/// The largest entry of a row, less the half unit that the rounding of the bases' rest adds.
double largest_row(int row_bits, bool is_split) {
  if (row_bits == 8) return 127;
  return is_split ? 29.5 : 14.5;
}

/// Integers up to so many have an exact 1152 - offset in fp16.
constexpr double kLargestOffset = 896;

/// One book's column of a channel, less its base, and the base: the mean or the least entry.
struct Column {
  std::vector<double> values;
  double base = 0;
  double largest = 0;

  Column(const float* first, int count, int stride, int row_bits) {
    if (row_bits == 4) {
      base = *first;
      for (int c = 1; c < count; ++c) base = std::min<double>(base, first[c * stride]);
    } else {
      for (int c = 0; c < count; ++c) base += first[c * stride];
      base /= count;
    }
    for (int c = 0; c < count; ++c) {
      values.push_back(first[c * stride] - base);
      largest = std::max(largest, std::abs(values.back()));
    }
  }
};

/// The books' columns of one channel.
struct Channel {
  std::vector<Column> columns;
  double base = 0;        ///< of all books together
  double sum = 0;         ///< of the largest entry of every book
  double least_unit = 0;  ///< with which the rows keep to their bounds

  Channel(const KeyCodebook<float>& codebook, const KeyPlane& plane, int channel, int row_bits) {
    const int channels = 2 * codebook.config.group_pairs;
    for (int book = 0; book < plane.num_books; ++book) {
      const int b = plane.first_book + book;
      columns.emplace_back(codebook.book(plane.group, b / 2, b % 2) + channel,
                           codebook.config.codebook_size, channels, row_bits);
      base += columns.back().base;
      sum += columns.back().largest;
      least_unit =
          std::max(least_unit, columns.back().largest /
                                   largest_row(row_bits, plane.place == 0 && book < kSplitBooks));
    }
    // Rounding adds half a unit a book, and half a unit of the bases' rest.
    least_unit = std::max({least_unit, sum / (largest_sum(row_bits) - 0.5 * (plane.num_books + 1)),
                           std::abs(base) / (kLargestOffset - 1)});
  }
};

}  // namespace

int slice_width(const KeyCodecConfig& config) {
  return config.group_pairs > 32 ? 64 : 32;
}

IntegerKeySlice::IntegerKeySlice(const KeyCodebook<float>& codebook, const KeyPlane& plane,
                                 int first_pair, int num_pairs, int width_, int row_bits_,
                                 const std::vector<float>& least_units)
    : width(width_),
      row_bits(row_bits_),
      is_split(row_bits == 4 && plane.place == 0),
      num_books(plane.num_books),
      codebook_size(codebook.config.codebook_size),
      rows(static_cast<std::size_t>(num_books) * codebook_size * 2 * width),
      offsets(2 * static_cast<std::size_t>(width)),
      bases(static_cast<std::size_t>(num_books) * 2 * width),
      units(static_cast<std::size_t>(width)) {
  const int g = codebook.config.group_pairs;
  const int first_in_group = first_pair - plane.group * g;
  for (int i = 0; i < num_pairs; ++i) {
    const Channel parts[2] = {{codebook, plane, first_in_group + i, row_bits},
                              {codebook, plane, g + first_in_group + i, row_bits}};
    double unit = std::max(parts[0].least_unit, parts[1].least_unit);
    if (!least_units.empty())
      unit = std::max<double>(unit, least_units[static_cast<std::size_t>(i)]);
    units[static_cast<std::size_t>(i)] = static_cast<float>(unit);
    if (unit == 0) continue;
    for (int part = 0; part < 2; ++part) {
      const double offset = std::nearbyint(parts[part].base / unit);
      const double rest = parts[part].base / unit - offset;
      offsets[static_cast<std::size_t>(part * width + i)] = static_cast<std::int16_t>(offset);
      for (int book = 0; book < num_books; ++book) {
        const Column& column = parts[part].columns[static_cast<std::size_t>(book)];
        bases[static_cast<std::size_t>((book * 2 + part) * width + i)] =
            static_cast<float>(column.base);
        for (int c = 0; c < codebook_size; ++c) {
          const double value = column.values[static_cast<std::size_t>(c)] / unit;
          rows[(static_cast<std::size_t>(book * codebook_size + c) * 2 + part) * width + i] =
              static_cast<std::int16_t>(std::nearbyint(value + (book == 0 ? rest : 0.0)));
        }
      }
    }
  }
}

namespace {

int books_per_line(int width, int row_bits) {
  return 64 * 8 / (width * row_bits);
}

/// Four integers of one word add up as one: a byte carries what bytes below it borrow. Pairs
/// 8k + 2q and 8k + 2q + 1 of `row`, each integer mapped by `part`.
template <class Part>
std::uint32_t add_up(const std::int16_t* row, int width, int k, int q, Part part) {
  std::int32_t word = 0;
  for (int byte = 3; byte >= 0; --byte)
    word = word * 256 + part(row[byte / 2 * width + 8 * k + 2 * q + byte % 2]);
  return static_cast<std::uint32_t>(word);
}

/// Writes a row of `width * row_bits / 4` bytes.
template <class Part>
void write_row(std::int8_t* target, const std::int16_t* source, int width, int row_bits,
               Part part) {
  const int words = width * row_bits / 64;  // of a thread
  for (int k = 0; k < words; ++k)
    for (int q = 0; q < 4; ++q) {
      std::uint32_t word = add_up(source, width, k, q, part);
      if (row_bits == 4) word += add_up(source, width, k + words, q, part) << 4;
      std::memcpy(target + (k / 4 * 4 + q) * 16 + k % 4 * 4, &word, 4);
    }
}

}  // namespace

Index IntegerKeySlice::image_bytes(int width, int row_bits, bool is_split, int num_books,
                                   int codebook_size) {
  const int per_line = books_per_line(width, row_bits);
  const int lines = (is_split ? 1 : 0) + (num_books + per_line - 1) / per_line;
  return Index{lines} * codebook_size * 128;
}

std::vector<std::int8_t> IntegerKeySlice::image() const {
  const int per_line = books_per_line(width, row_bits);
  std::vector<std::int8_t> bytes(
      static_cast<std::size_t>(image_bytes(width, row_bits, is_split, num_books, codebook_size)));
  const auto row_at = [&](int line, int book, int c) {
    return bytes.data() + (Index{line} * codebook_size + c) * 128 +
           book % per_line * (128 / per_line);
  };
  const int before = is_split ? 1 : 0;
  for (int book = 0; book < num_books; ++book)
    for (int c = 0; c < codebook_size; ++c) {
      const std::int16_t* const source =
          &rows[static_cast<std::size_t>(book * codebook_size + c) * 2 * width];
      std::int8_t* const row = row_at(before + book / per_line, book, c);
      if (row_bits == 8) {
        write_row(row, source, width, row_bits, [](int entry) { return entry; });
        continue;
      }
      write_row(row, source, width, row_bits, [](int entry) { return std::min(entry, 15); });
      if (is_split && book < kSplitBooks)
        write_row(row_at(0, book, c), source, width, row_bits,
                  [](int entry) { return std::max(entry - 15, 0); });
      if (book % 2 == 0 && book + 1 == num_books) std::memcpy(row + 64, row, 64);
    }
  return bytes;
}

int planes_of_slice(const DevicePageLayout& layout, int first_plane) {
  const int next = first_plane + 1;
  return next < layout.num_planes && layout.planes[next].place == 1 ? 2 : 1;
}

std::vector<IntegerKeySlice> integer_slices(const KeyCodebook<float>& codebook,
                                            const DevicePageLayout& layout, int first_plane,
                                            int first_pair, int num_pairs) {
  const int width = slice_width(codebook.config);
  std::vector<IntegerKeySlice> slices;
  std::vector<float> least_units;
  // The first plane last: its units depend on the others'.
  for (int i = planes_of_slice(layout, first_plane) - 1; i >= 0; --i) {
    slices.insert(slices.begin(),
                  IntegerKeySlice(codebook, layout.planes[first_plane + i], first_pair, num_pairs,
                                  width, layout.key_row_bits, least_units));
    least_units = slices.front().units;
    for (float& unit : least_units) unit /= 16;
  }
  return slices;
}

std::vector<std::uint16_t> IntegerKeySlice::zero_points() const {
  const float zero = row_bits == 4 ? 1024.0f : 1152.0f;
  std::vector<std::uint16_t> result;
  for (int k = 0; k < width / 8; ++k)
    for (int q = 0; q < 4; ++q)
      for (int part = 0; part < 2; ++part)
        for (int e = 0; e < 2; ++e)
          result.push_back(
              to_fp16(zero - offsets[static_cast<std::size_t>(part * width + 8 * k + 2 * q + e)]));
  return result;
}

namespace {

/// Puts what a plane's integers stand for in the codebook's place: every book gets back what was
/// taken off it, so that encoders meet the residuals that they expect, and the first one the
/// difference to the offset that the device adds instead.
void replace(KeyCodebook<float>& codebook, const KeyPlane& plane, const IntegerKeySlice& slice,
             int first_in_group, int num_pairs) {
  const int g = codebook.config.group_pairs, size = codebook.config.codebook_size;
  for (int book = 0; book < plane.num_books; ++book) {
    const int b = plane.first_book + book;
    float* const target = codebook.book(plane.group, b / 2, b % 2) + first_in_group;
    for (int part = 0; part < 2; ++part)
      for (int i = 0; i < num_pairs; ++i) {
        const auto at = static_cast<std::size_t>(part * slice.width + i);
        const std::size_t stride = 2 * static_cast<std::size_t>(slice.width);
        const auto number = static_cast<std::size_t>(book);
        const double unit = slice.units[static_cast<std::size_t>(i)];
        double base = slice.bases[number * stride + at];
        if (book == 0) {
          base += slice.offsets[at] * unit;
          for (int other = 0; other < plane.num_books; ++other)
            base -= slice.bases[static_cast<std::size_t>(other) * stride + at];
        }
        for (int c = 0; c < size; ++c)
          target[c * 2 * g + part * g + i] = static_cast<float>(
              slice.rows[(number * static_cast<std::size_t>(size) + static_cast<std::size_t>(c)) *
                             stride +
                         at] *
                  unit +
              base);
      }
  }
}

}  // namespace

KeyCodec rounded_to_integers(const KeyCodec& codec, const DevicePageLayout& layout) {
  if (layout.is_binary()) return codec;  // in fp16 on the device
  const KeyCodecConfig& config = codec.config();
  const int g = config.group_pairs, width = slice_width(config);
  std::vector<KeyCodebook<float>> rounded;
  for (int head = 0; head < codec.num_kv_heads(); ++head) {
    KeyCodebook<float> codebook = codec.codebook(head);
    codebook.config.tied = false;  // the halves are rounded apart
    for (int p = 0; p < layout.num_planes; p += planes_of_slice(layout, p))
      for (int first = 0; first < g; first += width) {
        const int num_pairs = std::min(width, g - first);
        const auto slices = integer_slices(codec.codebook(head), layout, p,
                                           layout.planes[p].group * g + first, num_pairs);
        for (std::size_t i = 0; i < slices.size(); ++i)
          replace(codebook, layout.planes[p + static_cast<int>(i)], slices[i], first, num_pairs);
      }
    rounded.push_back(std::move(codebook));
  }
  return KeyCodec(std::move(rounded));
}

}  // namespace commvq::cuda
