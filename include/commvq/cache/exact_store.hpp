#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "commvq/core/export.h"
#include "commvq/core/float16.hpp"
#include "commvq/core/view.hpp"

namespace commvq {

/// Rounds `count` floats to `type` into `bytes`, `count * size_of(type)` bytes, any alignment.
COMMVQ_API void round_floats(const float* values, Index count, FloatType type, std::uint8_t* bytes);
/// The inverse: exact conversion to floats.
COMMVQ_API void widen_floats(const std::uint8_t* bytes, Index count, FloatType type, float* values);

/// A queue of tokens whose keys and values are stored in a `FloatType`: rows of
/// `[num_channels]` keys, then `[num_channels]` values. Grows at the end, shrinks at both ends.
class COMMVQ_API ExactStore {
 public:
  ExactStore(FloatType type, Index num_channels) : type_(type), num_channels_(num_channels) {}
  /// Takes over rows as `bytes()` gives them. Throws `Error` if they are not whole rows.
  ExactStore(FloatType type, Index num_channels, std::vector<std::uint8_t> rows);

  FloatType type() const { return type_; }
  Index size() const { return size_; }
  Index allocated_bytes() const { return static_cast<Index>(bytes_.capacity()); }

  /// Rounded keys and values of row `i`, `num_channels` numbers of `type()` each.
  const std::uint8_t* keys(Index i) const { return bytes_.data() + (begin_ + i) * row_bytes(); }
  const std::uint8_t* values(Index i) const { return keys(i) + num_channels_ * size_of(type_); }

  /// All rows, one after another: `[size()][keys, values][num_channels]`.
  std::span<const std::uint8_t> bytes() const {
    return {bytes_.data() + begin_ * row_bytes(), static_cast<std::size_t>(size_ * row_bytes())};
  }
  /// Bytes of one row: keys and values of one token.
  Index row_bytes() const { return 2 * num_channels_ * size_of(type_); }

  /// Appends rows `[tokens][num_channels]`. If memory runs out nothing has changed.
  void push_back(MatrixView<const float> keys, MatrixView<const float> values);
  /// Removes the oldest `count` rows; gives memory back once most of it is unused.
  void pop_front(Index count);
  /// Keeps the oldest `size` rows.
  void truncate(Index size);

 private:
  FloatType type_;
  Index num_channels_;
  Index begin_ = 0;  // rows already removed from the front of bytes_
  Index size_ = 0;
  std::vector<std::uint8_t> bytes_;
};

}  // namespace commvq
