#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "commvq/core/error.hpp"

namespace commvq {

/// Signed size and position type of the whole library.
using Index = std::int64_t;

/// A row-major matrix in host memory that somebody else owns: `rows` rows of `cols` contiguous
/// elements, consecutive rows `row_stride` elements apart (`row_stride >= cols`).
/// By convention a row is a token and the columns are `[heads][head_dim]`.
template <class T>
struct MatrixView {
  T* data = nullptr;
  Index rows = 0;
  Index cols = 0;
  Index row_stride = 0;

  MatrixView() = default;
  MatrixView(T* data_, Index rows_, Index cols_, Index row_stride_)
      : data(data_), rows(rows_), cols(cols_), row_stride(row_stride_) {}
  MatrixView(T* data_, Index rows_, Index cols_) : MatrixView(data_, rows_, cols_, cols_) {}

  /// A view of mutable elements is a view of constant ones.
  template <class U>
    requires(std::is_same_v<const U, T>)
  MatrixView(const MatrixView<U>& other)
      : MatrixView(other.data, other.rows, other.cols, other.row_stride) {}

  T* row(Index r) const { return data + r * row_stride; }
  T& operator()(Index r, Index c) const { return data[r * row_stride + c]; }

  /// Rows `[first, first + count)`.
  MatrixView middle_rows(Index first, Index count) const {
    return {row(first), count, cols, row_stride};
  }
  /// Columns `[first, first + count)` of every row.
  MatrixView middle_cols(Index first, Index count) const {
    return {data + first, rows, count, row_stride};
  }
};

/// Views a vector of `rows * cols` elements as a matrix. Throws `Error` if the size differs.
template <class T>
MatrixView<T> as_matrix(std::vector<T>& values, Index rows, Index cols) {
  require(static_cast<Index>(values.size()) == rows * cols, "a vector of ", values.size(),
          " elements cannot be viewed as [", rows, ", ", cols, "]");
  return {values.data(), rows, cols};
}
template <class T>
MatrixView<const T> as_matrix(const std::vector<T>& values, Index rows, Index cols) {
  require(static_cast<Index>(values.size()) == rows * cols, "a vector of ", values.size(),
          " elements cannot be viewed as [", rows, ", ", cols, "]");
  return {values.data(), rows, cols};
}

}  // namespace commvq
