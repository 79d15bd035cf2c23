#include "commvq/cuda/integer_codebook.hpp"

#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <cstring>
#include <utility>

#include "commvq/core/float16.hpp"
#include "commvq/cuda/device_codebooks.hpp"

#include "core/divide_up.hpp"
#include "cuda/narrow_weights.hpp"

namespace commvq::cuda {
namespace {

/// The largest sum of one row a book in 8 bits, in units.
constexpr double kLargestSum = 127;

/// What part of the largest entry in 4 bits rows may take: the rounding of the bases' rest adds up
/// to half a unit.
constexpr double kNarrowShare = 14.5 / 15;

/// Integers up to so many are exact zero points.
double largest_offset(int row_bits) {
  return row_bits == 8 ? 896 : 2047;
}

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

/// The books' columns of one channel of a group.
struct Channel {
  std::vector<Column> columns;
  double base = 0;  ///< of all books together

  Channel(const KeyCodebook<float>& codebook, const IntegerKeySlice& slice, int channel) {
    const int channels = 2 * codebook.config.group_pairs;
    for (int book = 0; book < slice.num_books; ++book) {
      const int b = slice.first_book + book;
      columns.emplace_back(codebook.book(slice.group, b / 2, b % 2) + channel,
                           codebook.config.codebook_size, channels, slice.row_bits);
      base += columns.back().base;
    }
  }
  /// With which the rows keep to their bounds; `stages` are those of rows of 4 bits.
  double least_unit(int row_bits, const std::vector<IntegerKeySlice::Stage>& stages) const {
    double sum = 0, unit = std::abs(base) / (largest_offset(row_bits) - 1);
    for (std::size_t book = 0; book < columns.size(); ++book) {
      sum += columns[book].largest;
      if (row_bits == 4)
        unit = std::max(unit, columns[book].largest / (kNarrowShare * stages[book / 2].largest()));
    }
    // Rounding adds half a unit a book, and half a unit of the bases' rest.
    if (row_bits == 8)
      unit = std::max(unit, sum / (kLargestSum - 0.5 * static_cast<double>(columns.size() + 1)));
    return unit;
  }
};

/// A pair's real and imaginary part.
using ChannelPair = std::array<Channel, 2>;

/// The stages' ranges, of the larger channel and book, [stage][pair].
std::vector<std::vector<double>> ranges_of(const std::vector<ChannelPair>& pairs, int num_books) {
  std::vector<std::vector<double>> ranges(static_cast<std::size_t>(num_books / 2));
  for (std::size_t stage = 0; stage < ranges.size(); ++stage)
    for (const ChannelPair& pair : pairs) {
      double largest = 0;
      for (const Channel& channel : pair)
        for (std::size_t which = 0; which < 2; ++which)
          largest = std::max(largest, channel.columns[2 * stage + which].largest);
      ranges[stage].push_back(largest);
    }
  return ranges;
}

}  // namespace

int slice_width(const KeyCodecConfig& config) {
  return config.group_pairs > 32 ? 64 : 32;
}

IntegerKeySlice::IntegerKeySlice(const KeyCodebook<float>& codebook, const DevicePageLayout& layout,
                                 int plane, int first_pair, int num_pairs)
    : width(slice_width(codebook.config)),
      row_bits(layout.key_row_bits),
      group(layout.planes[plane].group),
      first_book(INT_MAX),
      codebook_size(codebook.config.codebook_size),
      offsets(2 * static_cast<std::size_t>(width)),
      units(static_cast<std::size_t>(width)) {
  for (int i = plane; i < plane + layout.planes_at_once; ++i) {
    num_books += layout.planes[i].num_books;
    if (layout.planes[i].num_books > 0)
      first_book = std::min(first_book, layout.planes[i].first_book);
  }
  const auto channels = 2 * static_cast<std::size_t>(width);
  rows.resize(static_cast<std::size_t>(num_books * codebook_size) * channels);
  bases.resize(static_cast<std::size_t>(num_books) * channels);
  const int g = codebook.config.group_pairs;
  const int first_in_group = first_pair - group * g;
  std::vector<ChannelPair> pairs;
  pairs.reserve(static_cast<std::size_t>(num_pairs));
  for (int i = 0; i < num_pairs; ++i)
    pairs.push_back({Channel(codebook, *this, first_in_group + i),
                     Channel(codebook, *this, g + first_in_group + i)});
  if (row_bits == 4) stages = NarrowWeights(ranges_of(pairs, num_books)).stages;
  for (int i = 0; i < num_pairs; ++i) {
    const ChannelPair& parts = pairs[static_cast<std::size_t>(i)];
    const double unit =
        std::max(parts[0].least_unit(row_bits, stages), parts[1].least_unit(row_bits, stages));
    units[static_cast<std::size_t>(i)] = static_cast<float>(unit);
    if (unit == 0) continue;
    for (std::size_t part = 0; part < 2; ++part) {
      const std::size_t at = part * static_cast<std::size_t>(width) + static_cast<std::size_t>(i);
      const double offset = std::nearbyint(parts[part].base / unit);
      double rest = parts[part].base / unit - offset;
      offsets[at] = static_cast<std::int16_t>(offset);
      for (std::size_t book = static_cast<std::size_t>(num_books); book-- > 0; rest = 0) {
        const Column& column = parts[part].columns[book];
        const int step = row_bits == 4 ? stages[book / 2].step() : 1;
        bases[book * channels + at] = static_cast<float>(column.base);
        for (std::size_t c = 0; c < column.values.size(); ++c)
          rows[(book * column.values.size() + c) * channels + at] = static_cast<std::int16_t>(
              step * std::nearbyint((column.values[c] / unit + rest) / step));
      }
    }
  }
}

namespace {

/// Four integers of one word add up as one: a byte carries what bytes below it borrow. Pairs
/// 8k + 2q and 8k + 2q + 1 of `row`.
std::uint32_t add_up(const std::int16_t* row, int width, int k, int q) {
  std::int32_t word = 0;
  for (int byte = 3; byte >= 0; --byte)
    word = word * 256 + row[byte / 2 * width + 8 * k + 2 * q + byte % 2];
  return static_cast<std::uint32_t>(word);
}

void write_byte_row(std::int8_t* target, const std::int16_t* source, int width) {
  for (int k = 0; k < width / 8; ++k)
    for (int q = 0; q < 4; ++q) {
      const std::uint32_t word = add_up(source, width, k, q);
      std::memcpy(target + (k / 4 * 4 + q) * 16 + k % 4 * 4, &word, 4);
    }
}

/// The largest number below sixteen that is at most `entry` when multiplied with `weight`.
int first_number(int entry, int weight) {
  return std::min(entry / weight, 15);
}

/// Each integer mapped by `number`.
template <class Number>
void write_narrow_row(std::int8_t* target, const std::int16_t* source, int width, Number number) {
  for (int pair = 0; pair < width; ++pair) {
    const int word = pair / 16 * 4 + pair / 8 % 2 + pair / 4 % 2 * 2;
    target[4 * word + pair % 4] =
        static_cast<std::int8_t>(number(source[pair]) | number(source[width + pair]) << 4);
  }
}

}  // namespace

Index IntegerKeySlice::image_bytes(int width, int row_bits, int num_books, int codebook_size) {
  if (row_bits == 4)
    return Index{KeySlice::narrow_groups(num_books)} * 4 * KeySlice::kNarrowLineBytes;
  return Index{divide_up(num_books, 64 / width)} * codebook_size * 128;
}

std::vector<std::int8_t> IntegerKeySlice::image() const {
  std::vector<std::int8_t> bytes(
      static_cast<std::size_t>(image_bytes(width, row_bits, num_books, codebook_size)));
  const auto source_of = [&](int book, int c) {
    return &rows[static_cast<std::size_t>(book * codebook_size + c) * 2 *
                 static_cast<std::size_t>(width)];
  };
  if (row_bits == 8) {
    const int per_line = 64 / width;
    for (int book = 0; book < num_books; ++book)
      for (int c = 0; c < codebook_size; ++c)
        write_byte_row(bytes.data() + (Index{book / per_line} * codebook_size + c) * 128 +
                           book % per_line * (128 / per_line),
                       source_of(book, c), width);
    return bytes;
  }
  for (std::size_t s = 0; s < stages.size(); ++s) {
    const Stage& stage = stages[s];
    const auto write_line = [&](int line, auto number) {
      for (int which = 0; which < 2; ++which)
        for (int c = 0; c < codebook_size; ++c)
          write_narrow_row(
              bytes.data() + Index{line} * KeySlice::kNarrowLineBytes + c * 128 + which * 64,
              source_of(2 * static_cast<int>(s) + which, c), width, number);
    };
    const auto first = [&](int entry) { return first_number(entry, stage.first); };
    write_line(stage.line, first);
    if (stage.second > 0)
      write_line(stage.second_line,
                 [&](int entry) { return (entry - stage.first * first(entry)) / stage.second; });
  }
  return bytes;
}

std::vector<int> IntegerKeySlice::line_weights() const {
  std::vector<int> weights(
      static_cast<std::size_t>(row_bits == 4 ? 4 * KeySlice::narrow_groups(num_books) : 0));
  for (const Stage& stage : stages) {
    weights[static_cast<std::size_t>(stage.line)] = stage.first;
    if (stage.second > 0) weights[static_cast<std::size_t>(stage.second_line)] = stage.second;
  }
  return weights;
}

std::vector<std::uint16_t> IntegerKeySlice::zero_points() const {
  const auto zero_of = [&](int offset) {
    return row_bits == 4 ? static_cast<float>(offset) / 512 : 1152.0f - static_cast<float>(offset);
  };
  std::vector<std::uint16_t> result;
  for (int k = 0; k < width / 8; ++k)
    for (int q = 0; q < 4; ++q)
      for (int part = 0; part < 2; ++part)
        for (int e = 0; e < 2; ++e)
          result.push_back(to_fp16(
              zero_of(offsets[static_cast<std::size_t>(part * width + 8 * k + 2 * q + e)])));
  return result;
}

namespace {

/// Puts what a slice's integers stand for in the codebook's place: every book gets back what was
/// taken off it, so that encoders meet the residuals that they expect, and the last one the
/// difference to the offset that the device adds instead.
void replace(KeyCodebook<float>& codebook, const IntegerKeySlice& slice, int first_in_group,
             int num_pairs) {
  const int g = codebook.config.group_pairs, size = codebook.config.codebook_size;
  const int last = slice.num_books - 1;
  for (int book = 0; book <= last; ++book) {
    const int b = slice.first_book + book;
    float* const target = codebook.book(slice.group, b / 2, b % 2) + first_in_group;
    for (int part = 0; part < 2; ++part)
      for (int i = 0; i < num_pairs; ++i) {
        const auto at = static_cast<std::size_t>(part * slice.width + i);
        const std::size_t stride = 2 * static_cast<std::size_t>(slice.width);
        const auto number = static_cast<std::size_t>(book);
        const double unit = slice.units[static_cast<std::size_t>(i)];
        double base = slice.bases[number * stride + at];
        if (book == last) {
          base += slice.offsets[at] * unit;
          for (int other = 0; other <= last; ++other)
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
    for (int p = 0; p < layout.num_planes; p += layout.planes_at_once)
      for (int first = 0; first < g; first += width) {
        const int num_pairs = std::min(width, g - first);
        const IntegerKeySlice slice(codec.codebook(head), layout, p,
                                    layout.planes[p].group * g + first, num_pairs);
        replace(codebook, slice, first, num_pairs);
      }
    rounded.push_back(std::move(codebook));
  }
  return KeyCodec(std::move(rounded));
}

}  // namespace commvq::cuda
