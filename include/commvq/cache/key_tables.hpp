#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "commvq/key_codec/key_codec.hpp"

namespace commvq {

/// The codebooks of a key codec in fixed point, the form in which attention adds up their rows.
///
/// Every pair of channels has a unit of its own, chosen so that no sum of one row per book
/// overflows 16 bits: pair i of a decoded head is unit(i) times the sum of its integers. A row is
/// planar like a `KeyCodebook`'s, but each half is padded with zeros to `padded_pairs()`.
class KeyTables {
 public:
  /// Integers in one cache line.
  static constexpr int kLanes = 32;

  explicit KeyTables(std::shared_ptr<const KeyCodec> codec);

  /// The tables of a codec, made at the first call and shared as long as anybody holds them. Any
  /// number of threads may call at once.
  static std::shared_ptr<const KeyTables> of(const std::shared_ptr<const KeyCodec>& codec);

  const KeyCodecConfig& config() const { return codec_->config(); }
  /// group_pairs rounded up to a multiple of 16.
  int padded_pairs() const { return padded_pairs_; }
  /// Integers of one row, a multiple of kLanes.
  int row_size() const { return 2 * padded_pairs_; }

  /// Cache lines of one row, each kLanes integers.
  int num_columns() const { return row_size() / kLanes; }

  /// Column `column` of the rows of one group of a head, `[num_stages * 2][codebook_size][kLanes]`.
  /// Columns lie apart, so that those of several books fit the first cache level.
  const std::int16_t* column(int head, int group_index, int column_index) const {
    return lines_.data()->lanes +
           ((head * config().num_groups() + group_index) * num_columns() + column_index) *
               column_size();
  }
  /// Units of a head's pairs, `[num_pairs]`.
  const float* units(int head) const {
    return units_.data() + static_cast<Index>(head) * config().pairs.num_pairs();
  }

 private:
  struct alignas(64) Line {
    std::int16_t lanes[kLanes];
  };

  Index column_size() const {
    return Index{config().num_stages} * 2 * config().codebook_size * kLanes;
  }
  void fill(int head, int group_index);

  std::shared_ptr<const KeyCodec> codec_;  // also keeps its address from being used again
  int padded_pairs_;
  std::vector<Line> lines_;
  std::vector<float> units_;
};

}  // namespace commvq
