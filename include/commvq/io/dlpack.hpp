#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "commvq/core/view.hpp"

#if !__has_include(<dlpack/dlpack.h>)
#error "commvq/io/dlpack.hpp needs dlpack/dlpack.h, 0.6 or later (Debian: libdlpack-dev)"
#endif
#include <dlpack/dlpack.h>

/// Tensors of other frameworks as the library's matrices, and back, without a copy. Header-only;
/// not a part of commvq.hpp, because it needs DLPack's header.
namespace commvq {

namespace dlpack_detail {

/// The device's type as a number: another framework may know devices that this header does not,
/// and no variable of the enumeration may hold what lies far outside it.
inline int device_type_of(const DLTensor& tensor) {
  int type = 0;
  static_assert(sizeof type == sizeof tensor.device.device_type);
  std::memcpy(&type, &tensor.device.device_type, sizeof type);
  return type;
}

/// Throws `Error` unless the tensor holds float32 in memory that the host can read.
inline void require_host_floats(const DLTensor& tensor) {
  const int device_type = device_type_of(tensor);
  require(device_type == static_cast<int>(kDLCPU) || device_type == static_cast<int>(kDLCUDAHost),
          "the DLPack tensor is on a device of type ", device_type, "; it must be in host memory (",
          static_cast<int>(kDLCPU), ", or ", static_cast<int>(kDLCUDAHost),
          " if pinned): copy it there first");
  require(tensor.dtype.code == kDLFloat && tensor.dtype.bits == 32 && tensor.dtype.lanes == 1,
          "the DLPack tensor has elements of type code ", int{tensor.dtype.code}, ", ",
          int{tensor.dtype.bits}, " bits and ", tensor.dtype.lanes,
          " lanes; it must be float32: code ", static_cast<int>(kDLFloat),
          ", 32 bits and 1 lane: convert it first");
}

/// Throws `Error` unless the elements of a row `[cols]` or `[heads][head_dim]` are contiguous.
inline void require_contiguous_rows(const DLTensor& tensor) {
  if (tensor.strides == nullptr) return;  // compact by definition
  Index expected = 1;
  for (int axis = tensor.ndim - 1; axis >= 1; --axis) {
    const Index size = tensor.shape[axis];
    require(size <= 1 || tensor.strides[axis] == expected, "axis ", axis,
            " of the DLPack tensor has a stride of ", tensor.strides[axis],
            " elements; it must be ", expected,
            ", for rows to be contiguous: make it contiguous first");
    expected *= size;
  }
}

}  // namespace dlpack_detail

/// Views a DLPack tensor `[tokens][channels]` or `[tokens][heads][head_dim]`, float32 in host
/// memory, as rows of tokens. Nothing is copied: the view lives as long as the tensor. `T` is
/// `const float`, or `float` if the tensor may be written (DLPack before 1.0 does not say).
/// Tokens may be any distance apart, at least a row. Throws `Error` naming what does not fit:
/// device, type, lanes, number of axes, sizes, strides, alignment (with byte_offset), null data.
template <class T>
MatrixView<T> from_dlpack(const DLTensor& tensor) {
  static_assert(std::is_same_v<std::remove_const_t<T>, float>);
  constexpr Index kMost = std::numeric_limits<Index>::max() / 8;  // elements that can be addressed
  dlpack_detail::require_host_floats(tensor);
  require(tensor.ndim == 2 || tensor.ndim == 3, "the DLPack tensor has ", tensor.ndim,
          " axes; it must have 2, [tokens][channels], or 3, [tokens][heads][head_dim]");
  require(tensor.shape != nullptr, "the DLPack tensor has no shape");
  Index cols = 1;
  for (int axis = 0; axis < tensor.ndim; ++axis) {
    const Index size = tensor.shape[axis];
    require(size >= (axis == 0 ? 0 : 1), "axis ", axis, " of the DLPack tensor has ", size,
            " elements");
    if (axis == 0) continue;
    require(size <= kMost / cols, "a row of the DLPack tensor has more elements than memory");
    cols *= size;
  }
  dlpack_detail::require_contiguous_rows(tensor);
  const Index rows = tensor.shape[0];
  const Index stride = tensor.strides == nullptr || rows <= 1 ? cols : tensor.strides[0];
  require(stride >= cols, "tokens of the DLPack tensor are ", stride,
          " elements apart; it must be at least the ", cols, " of a row");
  require(rows == 0 || stride <= kMost / rows, "the DLPack tensor has ", rows, " tokens, ", stride,
          " elements apart: more than can be addressed");
  require(rows == 0 || tensor.data != nullptr, "the DLPack tensor has ", rows,
          " tokens, but its data is null");
  if (rows == 0) return {nullptr, 0, cols, cols};
  const auto address = reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset;
  require(address % alignof(float) == 0, "the DLPack tensor's elements begin at address ", address,
          ", byte_offset ", tensor.byte_offset, " included; it must be a multiple of ",
          alignof(float));
  return {reinterpret_cast<T*>(address), rows, cols, stride};
}

/// Shares a matrix with another framework as a float32 tensor `[rows][cols]` in host memory,
/// without a copy. `owner` is what keeps the elements alive; it is let go when the receiver calls
/// the tensor's deleter, which it must do once. Throws `Error` for a matrix whose rows overlap or
/// whose data is null.
inline DLManagedTensor* to_dlpack(MatrixView<float> matrix, std::shared_ptr<const void> owner) {
  struct Shared {
    DLManagedTensor tensor{};
    std::int64_t shape[2], strides[2];
    std::shared_ptr<const void> owner;
  };
  require(matrix.rows >= 0 && matrix.cols >= 0 && matrix.row_stride >= matrix.cols, "a matrix of [",
          matrix.rows, ", ", matrix.cols, "] with rows ", matrix.row_stride,
          " elements apart is no tensor");
  require(matrix.data != nullptr || matrix.rows * matrix.cols == 0, "a matrix of [", matrix.rows,
          ", ", matrix.cols, "] has null data");
  auto* const shared =
      new Shared{{}, {matrix.rows, matrix.cols}, {matrix.row_stride, 1}, std::move(owner)};
  DLTensor& tensor = shared->tensor.dl_tensor;
  tensor.data = matrix.data;
  tensor.device.device_type = kDLCPU;
  tensor.device.device_id = 0;
  tensor.ndim = 2;
  tensor.dtype.code = kDLFloat;
  tensor.dtype.bits = 32;
  tensor.dtype.lanes = 1;
  tensor.shape = shared->shape;
  tensor.strides = shared->strides;
  tensor.byte_offset = 0;
  shared->tensor.manager_ctx = shared;
  shared->tensor.deleter = [](DLManagedTensor* self) {
    delete static_cast<Shared*>(self->manager_ctx);
  };
  return &shared->tensor;
}

}  // namespace commvq
