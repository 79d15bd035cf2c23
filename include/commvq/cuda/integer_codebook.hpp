#pragma once

#include <cstdint>
#include <vector>

#include "commvq/core/export.h"
#include "commvq/cuda/page_layout.hpp"
#include "commvq/key_codec/key_codec.hpp"

namespace commvq::cuda {

/// The rows of a head's books in integers of 8 or 4 bits that one kernel adds up, for up to `width`
/// pairs.
///
/// A pair has a unit of its own. Rows are rounded after each book's mean (8 bits) or least entry (4
/// bits) over its centroids was taken off; these come back as one integer offset per channel, and
/// what their rounding leaves goes into the last book. At 8 bits the unit is the smallest for which
/// no sum of one row a book leaves [-127, 127]: four sums then add up in one 32-bit word, whatever
/// the intermediate sums. At 4 bits entries are some units times a number in [0, 15], more units
/// for stages whose rows are larger, or two such products; sums stay below 2048.
struct COMMVQ_API IntegerKeySlice {
  /// How rows of 4 bits of a stage become integers: entries are `first` times a number in [0, 15],
  /// or of a split stage that and `second` times another one, in a line of their own.
  struct Stage {
    int line;         ///< of its rows in the image
    int second_line;  ///< of its second numbers; -1: it is not split
    int first;
    int second;  ///< 0 if it is not split

    /// The difference of neighbouring entries, and the largest one.
    int step() const { return second > 0 ? second : first; }
    int largest() const { return 15 * (first + second); }
  };

  int width = 64;  ///< pairs, 64 or 32
  int row_bits = 8;
  int group = 0;       ///< of pairs
  int first_book = 0;  ///< of the group's
  int num_books = 0;   ///< consecutive
  int codebook_size = 0;
  std::vector<std::int16_t> rows;     ///< [num_books][codebook_size][2][width], in units
  std::vector<std::int16_t> offsets;  ///< [2][width]
  std::vector<float> bases;           ///< [num_books][2][width]: what was taken off, not in units
  std::vector<float> units;           ///< [width]
  std::vector<Stage> stages;          ///< at 4 bits; else empty

  /// Rounds pairs `[first_pair, first_pair + num_pairs)` (of the head) of the books of
  /// `layout.planes_at_once` planes from `layout.planes[plane]` on.
  IntegerKeySlice(const KeyCodebook<float>& codebook, const DevicePageLayout& layout, int plane,
                  int first_pair, int num_pairs);

  /// Bytes of `image`.
  static Index image_bytes(int width, int row_bits, int num_books, int codebook_size);
  /// The kernel's shared memory.
  ///
  /// At 8 bits lines of 128 bytes, at width 64 `[book][centroid]`, at width 32 `[two
  /// books][centroid]`, the even book's row first. Within a row, 16-byte piece q and (at width 64)
  /// q + 4 belong to thread q of four; word k of a thread is pairs 8k + 2q and 8k + 2q + 1: real
  /// parts, then imaginary parts.
  ///
  /// At 4 bits `[line]`, where four lines are added up together: of each
  /// `[centroid][book of a stage][64]` bytes and padding (`KeySlice::kNarrowLineBytes`). The byte
  /// of a pair has its real part in the low half and its imaginary part in the high one, without
  /// the line's weight; word 4c + i of a row is pairs 16c + 8(i % 2) + 4(i / 2) and the next three.
  /// Lines are stages in their order. If these are no multiple of four, the last four lines begin
  /// with second numbers of the first stages, or with zeros where there are three stages or less.
  std::vector<std::int8_t> image() const;
  /// What the numbers of the image's lines are to be multiplied with, [groups of four lines][4].
  std::vector<int> line_weights() const;
  /// What brings a sum to the key in units, as fp16 numbers
  /// `[width / 8][4 threads][real, imaginary][2 pairs]`: at 8 bits 1152 - offset, which is taken
  /// off 1024 and a byte, the sum plus 128; at 4 bits offset / 512, which is added to a sum / 512.
  std::vector<std::uint16_t> zero_points() const;
};

/// The codec whose codebooks are what the integers stand for: with it the evaluation measures what
/// rounding costs. The same codes decode to what the device computes.
COMMVQ_API KeyCodec rounded_to_integers(const KeyCodec& codec, const DevicePageLayout& layout);

/// Pairs of a head that one slice covers: 64 for groups of more than 32 pairs, else 32.
COMMVQ_API int slice_width(const KeyCodecConfig& config);

}  // namespace commvq::cuda
