#include "prepare/binary_keys.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "commvq/core/error.hpp"
#include "commvq/core/float16.hpp"

namespace commvq::cuda {
namespace {

constexpr int kPairs = BinaryKeys::kPairs, kTileTokens = BinaryKeys::kTileTokens;
constexpr int kNodes = BinaryKeys::kNodes;
/// Of Chebyshev's four points of a tile, whole tokens.
constexpr std::array<int, kNodes> kNodePlaces = {9, 78, 177, 246};
static_assert(kNodePlaces[2] - kNodePlaces[0] == kNodePlaces[3] - kNodePlaces[1],
              "the kernel turns queries from the first two to the others");
/// Largest error allowed of a pair's turn, interpolated.
constexpr double kInterpolationError = 5e-3;

/// Lagrange's polynomials of the nodes at a place.
std::array<double, kNodes> node_weights_at(int place) {
  std::array<double, kNodes> weights;
  for (int i = 0; i < kNodes; ++i) {
    weights[i] = 1;
    for (int j = 0; j < kNodes; ++j)
      if (j != i)
        weights[i] *= double(place - kNodePlaces[j]) / double(kNodePlaces[i] - kNodePlaces[j]);
  }
  return weights;
}

/// Largest error of interpolating e^{j theta t} over a tile.
double interpolation_error(double theta) {
  double worst = 0;
  for (int place = 0; place < kTileTokens; ++place) {
    const auto weights = node_weights_at(place);
    double real = -std::cos(theta * place), imag = -std::sin(theta * place);
    for (int i = 0; i < kNodes; ++i) {
      real += weights[i] * std::cos(theta * kNodePlaces[i]);
      imag += weights[i] * std::sin(theta * kNodePlaces[i]);
    }
    worst = std::max(worst, std::hypot(real, imag));
  }
  return worst;
}

/// Eights of pairs to decode: frequencies fall with the pair.
int high_eights_of(const Rope& rope) {
  int pairs = kPairs;
  while (pairs > 0 && interpolation_error(rope.frequency(pairs - 1)) <= kInterpolationError)
    --pairs;
  for (const int eights : {3, 5})
    if (pairs <= 8 * eights) return eights;
  return 8;
}

/// One head as k = k_0 + sum over codes b_i e_i, with k_0 as the row of one more code, and rows of
/// zeros up to 128 a word of a lane: `[codes][2 * kPairs]`, real parts first.
std::vector<double> rows_of(const KeyCodebook<float>& codebook, int num_rows) {
  constexpr int kSize = 2 * kPairs;
  std::vector<double> rows(static_cast<std::size_t>(num_rows * kSize));
  const int num_books = 2 * codebook.config.num_stages;
  for (int k = 0; k < num_books; ++k) {
    const float* const book = codebook.book(0, k / 2, k % 2);
    for (int i = 0; i < kSize; ++i) {
      rows[static_cast<std::size_t>(k * kSize + i)] = double(book[kSize + i]) - double(book[i]);
      rows[static_cast<std::size_t>(num_books * kSize + i)] += double(book[i]);
    }
  }
  return rows;
}

/// A power of two that brings `largest` to at most `limit`.
double factor_to(double largest, double limit) {
  return largest > 0 ? std::exp2(std::floor(std::log2(limit / largest))) : 1.0;
}

/// Writes one head's operands.
class HeadWriter {
 public:
  HeadWriter(const KeyCodebook<float>& codebook, BinaryKeyImage& image)
      : image_(image), rows_(rows_of(codebook, 128 * image.keys.lane_words)) {}

  void write() {
    const int high_pairs = 8 * image_.keys.high_eights;
    const double high_factor = factor_to(128 * largest(0, high_pairs), 16384.0);
    write_high(high_factor);
    image_.high_factors.push_back(static_cast<float>(131072.0 / high_factor));
    // A product with a query, whose numbers are at most 1, must not overflow.
    const double low_factor = factor_to(
        128 * 2 * std::max(1, kPairs - high_pairs) * largest(high_pairs, kPairs), 32768.0);
    write_low(low_factor);
    image_.low_factors.push_back(static_cast<float>(131072.0 / low_factor));
  }

 private:
  double entry(int code, int pair, bool imag) const {
    return rows_[static_cast<std::size_t>(code * 2 * kPairs + (imag ? kPairs : 0) + pair)];
  }
  double largest(int first, int end) const {
    double result = 0;
    for (int code = 0; code < 128 * image_.keys.lane_words; ++code)
      for (int pair = first; pair < end; ++pair)
        result = std::max(
            {result, std::abs(entry(code, pair, false)), std::abs(entry(code, pair, true))});
    return result;
  }
  /// A code as the kernel reads it.
  struct Place {
    int code;     ///< or that of a number's first bit
    int bit;      ///< of half a word, the number's last one
    double unit;  ///< of a number that is 1, in the first bit's
  };

  /// An entry times 2^(7 - s % 8) for bit s of half a word, which as an fp16 number is 2^(s % 8 -
  /// 24).
  static void append(std::vector<std::uint16_t>& to, double value, int bit) {
    to.push_back(to_fp16(static_cast<float>(std::ldexp(value, 7 - bit % 8))));
  }

  int num_eights() const { return (image_.keys.graded ? 8 : 16) * image_.keys.lane_words; }
  /// Code `place` of eight `eight`: see `BinaryKeys::high_entries`.
  Place place_of(int eight, int place) const {
    const int half = 16 * (place % 2);
    if (!image_.keys.graded)
      return {32 * (4 * (eight / 16) + place / 2) + half + eight % 16, eight % 16, 1.0};
    // Bits are in the opposite order here: a byte's last number is the first.
    constexpr int kBit[4] = {0, 1, 3, 5};
    const int bit = 8 * (eight / 4 % 2) + kBit[eight % 4];
    const int first_bit = half + bit + graded_bits(3 - eight % 4) - 1;
    const int code = 32 * (4 * (eight / 8) + place / 2) + 31 - first_bit;
    return {code, bit, 1.0 / graded_bit(code).weight};
  }
  void append(std::vector<std::uint16_t>& to, double factor, Place place, int pair, bool imag) {
    append(to, factor * place.unit * entry(place.code, pair, imag), place.bit);
  }

  void write_high(double factor) {
    for (int pairs = 0; pairs < image_.keys.high_eights; ++pairs)
      for (const bool imag : {false, true})
        for (int eight = 0; eight < num_eights(); ++eight)
          for (int pair = 8 * pairs; pair < 8 * pairs + 8; ++pair)
            for (int place = 0; place < 8; ++place)
              append(image_.high_entries, factor, place_of(eight, place), pair, imag);
  }
  void write_low(double factor) {
    for (int pairs = image_.keys.high_eights; pairs < kPairs / 8; ++pairs)
      for (const bool imag : {false, true})
        for (int eight = 0; eight < num_eights(); ++eight)
          for (int place = 0; place < 8; ++place)
            for (int pair = 8 * pairs; pair < 8 * pairs + 8; ++pair)
              append(image_.low_entries, factor, place_of(eight, place), pair, imag);
  }

  BinaryKeyImage& image_;
  std::vector<double> rows_;
};

/// See `BinaryKeys::turns`: cosines and sines of two pairs, of a token and of the next one.
std::vector<std::uint16_t> turns_of(const Rope& rope, int high_eights) {
  std::vector<std::uint16_t> turns;
  std::vector<double> rotation(2 * static_cast<std::size_t>(rope.pairs().num_pairs()));
  for (int block = 0; block < BinaryKeys::kTurnTokens / 32; ++block)
    for (int eight = 0; eight < high_eights; ++eight)
      for (int m = 0; m < 2; ++m)
        for (int lane = 0; lane < 32; ++lane)
          for (int t = 0; t < 2; ++t) {
            const int g = lane / 4;
            rope.rotation_at(32 * block + 4 * (g / 2) + 16 * (g % 2) + 2 * m + t, rotation.data());
            for (const bool sine : {false, true})
              for (int odd = 0; odd < 2; ++odd) {
                const int pair = 8 * eight + 2 * (lane % 4) + odd;
                turns.push_back(to_fp16(static_cast<float>(
                    rotation[static_cast<std::size_t>(pair + (sine ? kPairs : 0))])));
              }
          }
  return turns;
}

}  // namespace

BinaryKeyImage::BinaryKeyImage(const KeyCodec& codec, const Rope& rope,
                               const DevicePageLayout& layout) {
  keys.high_eights = high_eights_of(rope);
  keys.lane_words = (layout.num_books + 8) / 128;
  keys.graded = codec.config().graded;
  std::copy(kNodePlaces.begin(), kNodePlaces.end(), keys.nodes);
  for (int head = 0; head < layout.num_kv_heads; ++head)
    HeadWriter(codec.codebook(head), *this).write();
  turns = turns_of(rope, keys.high_eights);
  for (int place = 0; place < kTileTokens; ++place)
    for (const double weight : node_weights_at(place))
      node_weights.push_back(static_cast<float>(weight));
}

}  // namespace commvq::cuda
