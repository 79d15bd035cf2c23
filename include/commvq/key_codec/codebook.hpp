#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "commvq/key_codec/config.hpp"

namespace commvq {

/// The additive codebook of one key head (CommVQ, section 3).
///
/// A head read as complex numbers is approximated by a sum of rows, per group of pairs:
///
///     kappa ~ sum over stages r of  Z_{r,0}[A_r] + Z_{r,1}[B_r]
///
/// In the paper's tied form Z_{r,1} = j Z_{r,0}; both books are stored all the same, so that
/// decoding is one kind of lookup. Because a row is a vector of complex numbers, it commutes with
/// RoPE: rotating the rows, the sum or the query gives the same score.
///
/// `rows` is `[num_groups][num_stages][2 books][codebook_size][2 * group_pairs]`; a row is planar:
/// group_pairs real parts, then group_pairs imaginary parts.
///
/// `pair_weights` is `[num_pairs]`, positive, or empty for all ones. They concern encoding alone:
/// the encoder minimises the sum over pairs of pair_weights[i]^2 |kappa_i - decoded_i|^2. With
/// weights from the queries (see `QueryStatistics`) that is the error of the attention logits.
template <class Scalar>
struct KeyCodebook {
  KeyCodecConfig config;
  std::vector<Scalar> rows;
  std::vector<Scalar> pair_weights;

  KeyCodebook() = default;
  /// An all-zero codebook. Throws `Error` if `config_` is invalid.
  explicit KeyCodebook(const KeyCodecConfig& config_) : config(config_) {
    config.validate();
    rows.assign(static_cast<std::size_t>(config.num_groups()) * config.num_stages * 2 *
                    config.codebook_size * row_size(),
                Scalar(0));
  }

  int row_size() const { return 2 * config.group_pairs; }

  /// The rows with every number multiplied by its pair's `factors[pair]`, `[num_pairs]`.
  std::vector<Scalar> scaled_rows(const std::vector<Scalar>& factors) const {
    std::vector<Scalar> result = rows;
    const int g = config.group_pairs;
    const std::size_t rows_per_group = rows.size() / row_size() / config.num_groups();
    for (std::size_t row = 0; row < rows_per_group * config.num_groups(); ++row)
      for (int i = 0; i < g; ++i) {
        const Scalar factor = factors[row / rows_per_group * g + i];
        result[row * row_size() + i] *= factor;
        result[row * row_size() + g + i] *= factor;
      }
    return result;
  }

  /// Book 0 (A) or 1 (B) of a stage: `[codebook_size][2 * group_pairs]`.
  const Scalar* book(int group, int stage, int which) const {
    return rows.data() + book_offset(group, stage, which);
  }
  Scalar* book(int group, int stage, int which) {
    return rows.data() + book_offset(group, stage, which);
  }

  /// Tied codebooks: sets every second book to j times the first, (re, im) -> (-im, re).
  void derive_tied_books() {
    const int g = config.group_pairs;
    for (int group = 0; group < config.num_groups(); ++group)
      for (int stage = 0; stage < config.num_stages; ++stage)
        for (int c = 0; c < config.codebook_size; ++c) {
          const Scalar* a = book(group, stage, 0) + c * row_size();
          Scalar* b = book(group, stage, 1) + c * row_size();
          for (int i = 0; i < g; ++i) {
            b[i] = -a[i + g];
            b[i + g] = a[i];
          }
        }
  }

  /// Graded codebooks: makes the rows what `KeyCodecConfig::graded` asks for, exactly. Row 0 of
  /// every book and both rows of the last book of every number decide. Each channel is rounded to
  /// 22 bits below its largest number, so that sums and differences of its rows need no rounding.
  void derive_graded_rows() {
    for (int group = 0; group < config.num_groups(); ++group)
      for (int i = 0; i < row_size(); ++i) derive_graded_channel(group, i);
  }

  /// Row 1 less row 0 of the group's book `2 * stage + which` in channel `i` of the group.
  Scalar difference(int group, int book, int i) const {
    const Scalar* const first = this->book(group, book / 2, book % 2) + i;
    return first[row_size()] - first[0];
  }

 private:
  void derive_graded_channel(int group, int i) {
    std::vector<double> steps(static_cast<std::size_t>(config.num_stages));
    const int num_books = 2 * config.num_stages;
    for (int book = 0; book < num_books; ++book)
      if (const GradedBit bit = graded_bit(book); bit.weight == 1)
        steps[static_cast<std::size_t>(bit.number)] = difference(group, book, i);
    double largest = 0;
    for (int book = 0; book < num_books; ++book) {
      const double first = this->book(group, book / 2, book % 2)[i];
      const GradedBit bit = graded_bit(book);
      const double step = bit.weight * steps[static_cast<std::size_t>(bit.number)];
      largest = std::max({largest, std::abs(first), std::abs(step), std::abs(first + step)});
    }
    int exponent = 0;
    std::frexp(largest, &exponent);
    const double unit = std::ldexp(1.0, std::max(exponent - 22, -149));  // float's least: 2^-149
    for (int book = 0; book < num_books; ++book) {
      Scalar* const numbers = this->book(group, book / 2, book % 2) + i;
      const GradedBit bit = graded_bit(book);
      const double first = std::nearbyint(numbers[0] / unit);
      const double step = std::nearbyint(steps[static_cast<std::size_t>(bit.number)] / unit);
      numbers[0] = static_cast<Scalar>(first * unit);
      numbers[row_size()] = static_cast<Scalar>((first + bit.weight * step) * unit);
    }
  }

  std::size_t book_offset(int group, int stage, int which) const {
    const auto book_index = (static_cast<std::size_t>(group) * config.num_stages + stage) * 2 + which;
    return book_index * config.codebook_size * row_size();
  }
};

/// Decodes one head. `codes` is `[num_groups][num_stages][2]`, each below codebook_size; `planar`
/// receives `[head_dim]` in planar order (see `PairLayout`), not yet multiplied by the norm.
template <class Scalar>
void decode_key(const KeyCodebook<Scalar>& codebook, const std::uint16_t* codes, Scalar* planar) {
  const KeyCodecConfig& config = codebook.config;
  const int g = config.group_pairs;
  const int num_pairs = config.pairs.num_pairs();
  for (int group = 0; group < config.num_groups(); ++group) {
    Scalar* const re = planar + group * g;
    Scalar* const im = re + num_pairs;
    for (int i = 0; i < g; ++i) re[i] = im[i] = Scalar(0);
    for (int stage = 0; stage < config.num_stages; ++stage)
      for (int which = 0; which < 2; ++which) {
        const Scalar* const row = codebook.book(group, stage, which) + *codes++ * codebook.row_size();
#pragma omp simd
        for (int i = 0; i < g; ++i) {
          re[i] += row[i];
          im[i] += row[i + g];
        }
      }
  }
}

}  // namespace commvq
