#pragma once

#include <cstdint>
#include <vector>

#include "commvq/core/export.h"
#include "commvq/cuda/page_layout.hpp"
#include "commvq/key_codec/key_codec.hpp"

namespace commvq::cuda {

/// The rows of one plane of a head in 8-bit integers, for up to `width` pairs.
///
/// A pair has a unit of its own. Rows are rounded after each book's mean over its centroids was
/// taken off; the means come back as one integer offset per channel, and what their rounding leaves
/// goes into the first book. The unit is the smallest for which no sum of one row a book leaves
/// [-127, 127]: four sums then add up in one 32-bit word, whatever the intermediate sums.
struct COMMVQ_API IntegerKeySlice {
  int width = 64;  ///< pairs, 64 or 32
  int num_books = 0;
  int codebook_size = 0;
  std::vector<std::int16_t> rows;     ///< [num_books][codebook_size][2][width]
  std::vector<std::int16_t> offsets;  ///< [2][width]
  std::vector<float> units;           ///< [width]

  /// Rounds pairs `[first_pair, first_pair + num_pairs)` (of the head) of books
  /// `[first_book, first_book + num_books)` of a group.
  IntegerKeySlice(const KeyCodebook<float>& codebook, const KeyPlane& plane, int first_pair,
                  int num_pairs, int width);

  /// Bytes of `image`.
  static Index image_bytes(int width, int num_books, int codebook_size);
  /// The kernel's shared memory: lines of 128 bytes, `[book][centroid]` at width 64; at width 32 a
  /// line holds the rows of two consecutive books. Within a row, 16-byte piece q and (at width 64)
  /// q + 4 belong to thread q of four; word k of a thread is pairs 8k + 2q and 8k + 2q + 1: real
  /// parts, then imaginary parts.
  std::vector<std::int8_t> image() const;
  /// 1152 - offset as fp16, `[width / 8][4 threads][real, imaginary][2 pairs]`.
  std::vector<std::uint16_t> zero_points() const;
};

/// The codec whose codebooks are what the integers stand for: with it the evaluation measures what
/// rounding costs. The same codes decode to what the device computes.
COMMVQ_API KeyCodec rounded_to_integers(const KeyCodec& codec, const DevicePageLayout& layout);

/// Pairs of a head that one slice covers: 64 for groups of more than 32 pairs, else 32.
COMMVQ_API int slice_width(const KeyCodecConfig& config);

}  // namespace commvq::cuda
