#pragma once

#include <cstdint>
#include <vector>

#include "commvq/core/export.h"
#include "commvq/cuda/page_layout.hpp"
#include "commvq/key_codec/key_codec.hpp"

namespace commvq::cuda {

/// The rows of one plane of a head in integers of 8 or 4 bits, for up to `width` pairs.
///
/// A pair has a unit of its own. Rows are rounded after each book's mean (8 bits) or least entry (4
/// bits) over its centroids was taken off; these come back as one integer offset per channel, and
/// what their rounding leaves goes into the first book. The unit is the smallest for which no sum
/// of one row a book leaves [-127, 127] (8 bits) or [0, 255] (4 bits): four sums then add up in one
/// 32-bit word, whatever the intermediate sums. Rows of 4 bits are in [0, 15]; those of the first
/// stage that a kernel adds up, which are larger than the others, in [0, 30] and kept as two that
/// add up to them.
struct COMMVQ_API IntegerKeySlice {
  int width = 64;  ///< pairs, 64 or 32
  int row_bits = 8;
  bool is_split = false;  ///< rows of the first two books come in two parts
  int num_books = 0;
  int codebook_size = 0;
  std::vector<std::int16_t> rows;     ///< [num_books][codebook_size][2][width]
  std::vector<std::int16_t> offsets;  ///< [2][width]
  std::vector<float> bases;           ///< [num_books][2][width]: what was taken off, not in units
  std::vector<float> units;           ///< [width]

  /// Rounds pairs `[first_pair, first_pair + num_pairs)` (of the head) of the plane's books.
  /// `least_units` is empty or bounds the units from below, `[num_pairs]`.
  IntegerKeySlice(const KeyCodebook<float>& codebook, const KeyPlane& plane, int first_pair,
                  int num_pairs, int width, int row_bits,
                  const std::vector<float>& least_units = {});

  /// Bytes of `image`.
  static Index image_bytes(int width, int row_bits, bool is_split, int num_books,
                           int codebook_size);
  /// The kernel's shared memory: lines of 128 bytes, at width 64 and 8 bits `[book][centroid]`,
  /// else `[two books][centroid]`, the even book's row first (of 4 bits an odd last book's row
  /// twice). What split rows have above 15 comes in lines before all others.
  /// Within a row, 16-byte piece q and (at width 64 and 8 bits) q + 4 belong to thread q of four;
  /// word k of a thread is pairs 8k + 2q and 8k + 2q + 1: real parts, then imaginary parts. Words
  /// of 4 bits hold word k in the low and word k + 4 in the high halves of their bytes.
  std::vector<std::int8_t> image() const;
  /// What a sum of 4 bits, or of 8 bits plus 128, is less 1024 when it stands for zero, negated, as
  /// fp16 numbers `[width / 8][4 threads][real, imaginary][2 pairs]`: 1024 - offset and
  /// 1152 - offset.
  std::vector<std::uint16_t> zero_points() const;
};

/// The integer rows of pairs `[first_pair, first_pair + num_pairs)` of the head for the planes that
/// one kernel adds up, `planes_of_slice` from `layout.planes[first_plane]` on. Their units are at
/// most sixteen times those of the first.
COMMVQ_API std::vector<IntegerKeySlice> integer_slices(const KeyCodebook<float>& codebook,
                                                       const DevicePageLayout& layout,
                                                       int first_plane, int first_pair,
                                                       int num_pairs);

/// Planes from `first_plane` on that one kernel adds up: 1, or at 4 bits 2.
COMMVQ_API int planes_of_slice(const DevicePageLayout& layout, int first_plane);

/// The codec whose codebooks are what the integers stand for: with it the evaluation measures what
/// rounding costs. The same codes decode to what the device computes.
COMMVQ_API KeyCodec rounded_to_integers(const KeyCodec& codec, const DevicePageLayout& layout);

/// Pairs of a head that one slice covers: 64 for groups of more than 32 pairs, else 32.
COMMVQ_API int slice_width(const KeyCodecConfig& config);

}  // namespace commvq::cuda
