#pragma once

#include "encoder_view.hpp"

namespace commvq::cuda {

/// What searches by warpgroups read of one stage of books of 64 centroids of 128 numbers, as it
/// lies in memory: the books, of tied ones the first alone, as operands [hi, lo][real, imaginary
/// parts] [64 centroids][64 numbers] fp16, rows of 128 bytes in the order of 128-byte swizzles;
/// cross terms as 16-bit integers; squared norms; what 1 of the integers stands for. Offsets in
/// bytes.
template <bool kTied>
struct SearchStage {
  static constexpr int kSize = 64;    ///< centroids of a book
  static constexpr int kWidth = 128;  ///< numbers of a centroid
  static constexpr int kNumBooks = kTied ? 1 : 2;
  static constexpr int kHalfBytes = kSize * 128;
  static constexpr int kPartBytes = 2 * kHalfBytes;
  static constexpr int kBookBytes = 2 * kPartBytes;
  static constexpr int kTableBytes = kSize * kSize * 2;
  static constexpr int kCrossTerms = kNumBooks * kBookBytes;
  /// Minus the cross terms, by b: those of tied books are antisymmetric, <Z[a], j Z[b]> =
  /// -<Z[b], j Z[a]>.
  static constexpr int kMinusByB = kTied ? kCrossTerms : kCrossTerms + kTableBytes;
  static constexpr int kNorms = kMinusByB + kTableBytes;
  static constexpr int kUnit = kNorms + kNumBooks * kSize * 4;
  static constexpr int kBytes = kUnit + 16;

  /// Number i of centroid n of a book.
  static COMMVQ_HOST_DEVICE constexpr int operand(int n, int i) {
    return i / 64 * kHalfBytes + n * 128 + ((i % 64 / 8) ^ (n % 8)) * 16 + i % 8 * 2;
  }
  /// Within a table of terms, those of a: for each lane of four, t, the b that it has of a
  /// product's sums, 8 n + 2 t and the next one, n = 0 to 7, sixteen bytes at a time. Where the a
  /// differ between lanes, most do not share a bank.
  static COMMVQ_HOST_DEVICE constexpr int cross_piece(int a, int half, int t) {
    return a * 128 + ((half * 4 + t) ^ (a / 2 % 4)) * 16;
  }
  static COMMVQ_HOST_DEVICE constexpr int cross_term(int a, int b) {
    return cross_piece(a, b / 32, b % 8 / 2) + b / 8 % 4 * 4 + b % 2 * 2;
  }
};

}  // namespace commvq::cuda
