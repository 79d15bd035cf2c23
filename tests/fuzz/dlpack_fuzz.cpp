// DLPack tensors with any fields: a view that comes out must lie within what the tensor spans.
#include <array>
#include <vector>

#include "commvq/io/dlpack.hpp"

#include "fuzz/byte_reader.hpp"
#include "fuzz/harness.hpp"

namespace {

using namespace commvq;

constexpr Index kElements = 4096;

/// Floats that the tensors point to.
std::vector<float>& elements() {
  static std::vector<float> floats(kElements, 1.0f);
  return floats;
}

/// A tensor as an input describes it. Shape and strides have four entries, more than any accepted
/// tensor's; a larger number of axes must be refused before they are read.
struct Tensor {
  std::array<std::int64_t, 4> shape{}, strides{};
  DLTensor dl{};

  explicit Tensor(fuzz::ByteReader& input) {
    const auto flags = input.take<std::uint8_t>();
    dl.data = (flags & 1) != 0 ? nullptr : elements().data();
    dl.ndim = (flags & 2) != 0 ? input.take<std::int32_t>() : 2 + (flags >> 7);
    std::int32_t device = kDLCPU;
    if ((flags & 4) != 0) device = input.take<std::uint8_t>();
    std::memcpy(&dl.device.device_type, &device, sizeof device);
    dl.dtype.code = (flags & 8) != 0 ? input.take<std::uint8_t>() : std::uint8_t{kDLFloat};
    dl.dtype.bits = (flags & 8) != 0 ? input.take<std::uint8_t>() : 32;
    dl.dtype.lanes = (flags & 8) != 0 ? input.take<std::uint16_t>() : 1;
    for (std::int64_t& size : shape) size = input.size();
    for (std::int64_t& stride : strides) stride = input.size();
    dl.shape = (flags & 16) != 0 ? nullptr : shape.data();
    dl.strides = (flags & 32) != 0 ? nullptr : strides.data();
    dl.byte_offset = (flags & 64) != 0 ? input.take<std::uint64_t>() : 0;
  }
};

/// Reads the corners of a view that lies in `elements()`; others cannot be told from good ones.
void check(MatrixView<const float> view, const Tensor& tensor) {
  fuzz::demand(view.rows == tensor.shape[0] && view.cols >= 1 && view.row_stride >= view.cols,
               "a view of another shape");
  if (view.rows == 0) return;
  fuzz::demand(view.data != nullptr, "a view of null data");
  Index last = 0, end = 0;
  fuzz::demand(!__builtin_mul_overflow(view.rows - 1, view.row_stride, &last) &&
                   !__builtin_add_overflow(last, view.cols, &end) &&
                   !__builtin_mul_overflow(end, Index{sizeof(float)}, &end),
               "a view of more than can be addressed");
  const Index offset = view.data - elements().data();
  if (tensor.dl.byte_offset > kElements * sizeof(float) ||
      offset + end / Index{sizeof(float)} > kElements)
    return;
  fuzz::demand(view(0, 0) == 1.0f && view(view.rows - 1, view.cols - 1) == 1.0f,
               "a view of other elements");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::ByteReader input({data, size});
  const Tensor tensor(input);
  fuzz::accepts(size, 1, [&] { check(from_dlpack<const float>(tensor.dl), tensor); });
  return 0;
}
