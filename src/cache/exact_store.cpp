#include "commvq/cache/exact_store.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace commvq {

void round_floats(const float* values, Index count, FloatType type, std::uint8_t* bytes) {
  if (type == FloatType::kFp32) {
    std::memcpy(bytes, values, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  for (Index i = 0; i < count; ++i) {
    const std::uint16_t bits = type == FloatType::kBf16 ? to_bf16(values[i]) : to_fp16(values[i]);
    std::memcpy(bytes + 2 * i, &bits, 2);
  }
}

void widen_floats(const std::uint8_t* bytes, Index count, FloatType type, float* values) {
  if (type == FloatType::kFp32) {
    std::memcpy(values, bytes, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  const auto widen_all = [&](auto widen) {
#pragma omp simd
    for (Index i = 0; i < count; ++i) {
      std::uint16_t bits;
      std::memcpy(&bits, bytes + 2 * i, 2);
      values[i] = widen(bits);
    }
  };
  if (type == FloatType::kBf16) {
    widen_all(from_bf16);
  } else {
    widen_all(from_fp16);
  }
}

ExactStore::ExactStore(FloatType type, Index num_channels, std::vector<std::uint8_t> rows)
    : type_(type), num_channels_(num_channels), bytes_(std::move(rows)) {
  const auto num_bytes = static_cast<Index>(bytes_.size());
  require(num_bytes % row_bytes() == 0, "exact copies of ", num_bytes,
          " bytes are not whole tokens of ", row_bytes());
  size_ = num_bytes / row_bytes();
}

void ExactStore::push_back(MatrixView<const float> keys, MatrixView<const float> values) {
  const Index new_bytes = (begin_ + size_ + keys.rows) * row_bytes();
  bytes_.resize(static_cast<std::size_t>(new_bytes));
  for (Index i = 0; i < keys.rows; ++i) {
    std::uint8_t* const row = bytes_.data() + (begin_ + size_ + i) * row_bytes();
    round_floats(keys.row(i), num_channels_, type_, row);
    round_floats(values.row(i), num_channels_, type_, row + row_bytes() / 2);
  }
  size_ += keys.rows;
}

void ExactStore::pop_front(Index count) {
  begin_ += count;
  size_ -= count;
  if (begin_ <= size_) return;
  // More than half is unused: move the rest to the front, at a cost of less than one row per row
  // removed.
  bytes_.erase(bytes_.begin(), bytes_.begin() + begin_ * row_bytes());
  begin_ = 0;
  if (bytes_.capacity() > 4 * bytes_.size()) bytes_.shrink_to_fit();
}

void ExactStore::truncate(Index size) {
  size_ = std::min(size_, size);
  bytes_.resize(static_cast<std::size_t>((begin_ + size_) * row_bytes()));
}

}  // namespace commvq
