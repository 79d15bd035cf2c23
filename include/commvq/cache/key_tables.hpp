#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "commvq/core/export.h"
#include "commvq/key_codec/key_codec.hpp"

namespace commvq {

/// The codebooks of a key codec in fixed point, the form in which attention adds up their rows.
///
/// Every pair of channels has a unit of its own, chosen so that no sum of one row per book
/// overflows 16 bits: pair i of a decoded head is unit(i) times the sum of its integers. Of tied
/// books only the first is kept: rows of the second are j times its rows.
class COMMVQ_API KeyTables {
 public:
  /// Integers in one cache line, and pairs in one column.
  static constexpr int kLanes = 32;

  explicit KeyTables(std::shared_ptr<const KeyCodec> codec);

  /// The tables of a codec, made at the first call and shared as long as anybody holds them. Any
  /// number of threads may call at once.
  static std::shared_ptr<const KeyTables> of(const std::shared_ptr<const KeyCodec>& codec);

  const KeyCodecConfig& config() const { return codec_->config(); }
  /// group_pairs rounded up to a multiple of kLanes; the padding is zeros.
  int padded_pairs() const { return padded_pairs_; }
  int num_columns() const { return padded_pairs_ / kLanes; }
  /// Books that are kept of each group: num_stages, or two a stage if untied.
  int num_books() const { return config().num_stages * (config().tied ? 1 : 2); }

  /// Integers of one row: real and imaginary parts of kLanes pairs, of the next kLanes pairs, ...
  int row_size() const { return 2 * padded_pairs_; }

  /// Rows of one group of a head, `[num_books()][codebook_size][num_columns()][2][kLanes]`, on
  /// cache lines.
  const std::int16_t* group(int head, int group_index) const {
    return lines_[first_line(head, group_index)].lanes;
  }
  /// Units of a head's pairs, `[num_pairs]`.
  const float* units(int head) const {
    return units_.data() + static_cast<Index>(head) * config().pairs.num_pairs();
  }

 private:
  struct alignas(64) Line {
    std::int16_t lanes[kLanes];
  };

  Index group_size() const { return Index{num_books()} * config().codebook_size * row_size(); }
  std::size_t first_line(int head, int group_index) const {
    const Index group = Index{head} * config().num_groups() + group_index;
    return static_cast<std::size_t>(group * group_size() / kLanes);
  }
  void fill(int head, int group_index);

  std::shared_ptr<const KeyCodec> codec_;  // also keeps its address from being used again
  int padded_pairs_;
  std::vector<Line> lines_;
  std::vector<float> units_;
};

}  // namespace commvq
