#include <bit>
#include <cstring>

#include "commvq/core/float16.hpp"
#include "commvq/io/safetensors.hpp"

#include "strict_json.hpp"
#include "tensor_size.hpp"

namespace commvq {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian");

/// Reads elements of type `Stored` at any alignment.
template <class Stored, class Convert>
std::vector<float> converted(std::span<const std::uint8_t> data, Convert convert) {
  std::vector<float> floats(data.size() / sizeof(Stored));
  const std::uint8_t* source = data.data();
  for (float& value : floats) {
    Stored stored;
    std::memcpy(&stored, source, sizeof(Stored));
    value = convert(stored);
    source += sizeof(Stored);
  }
  return floats;
}

}  // namespace

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kBool:
      return "BOOL";
    case Dtype::kU8:
      return "U8";
    case Dtype::kI8:
      return "I8";
    case Dtype::kU16:
      return "U16";
    case Dtype::kI16:
      return "I16";
    case Dtype::kU32:
      return "U32";
    case Dtype::kI32:
      return "I32";
    case Dtype::kU64:
      return "U64";
    case Dtype::kI64:
      return "I64";
    case Dtype::kF16:
      return "F16";
    case Dtype::kBf16:
      return "BF16";
    case Dtype::kF32:
      return "F32";
    case Dtype::kF64:
      return "F64";
  }
  return "unknown";
}

Index size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kBool:
    case Dtype::kU8:
    case Dtype::kI8:
      return 1;
    case Dtype::kU16:
    case Dtype::kI16:
    case Dtype::kF16:
    case Dtype::kBf16:
      return 2;
    case Dtype::kU32:
    case Dtype::kI32:
    case Dtype::kF32:
      return 4;
    case Dtype::kU64:
    case Dtype::kI64:
    case Dtype::kF64:
      return 8;
  }
  fail("unknown Dtype ", static_cast<int>(dtype));
}

std::string detail::to_text(const std::vector<Index>& shape) {
  constexpr std::size_t kMostShown = 16;
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size() && i < kMostShown; ++i)
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + (shape.size() > kMostShown ? ", ...]" : "]");
}

Index TensorView::num_elements() const {
  return static_cast<Index>(data.size()) / size_of(dtype);
}

std::vector<float> TensorView::to_floats() const {
  switch (dtype) {
    case Dtype::kF16:
      return converted<std::uint16_t>(data, from_fp16);
    case Dtype::kBf16:
      return converted<std::uint16_t>(data, from_bf16);
    case Dtype::kF32:
      return converted<float>(data, [](float value) { return value; });
    case Dtype::kF64:
      return converted<double>(data, [](double value) { return static_cast<float>(value); });
    default:
      fail("tensor ", detail::in_quotes(name), " holds ", name_of(dtype),
           "; F16, BF16, F32 or F64 is needed");
  }
}

std::vector<float> TensorView::to_floats(const std::vector<Index>& expected_shape) const {
  require(shape == expected_shape, "tensor ", detail::in_quotes(name), " has shape ",
          detail::to_text(shape), "; ", detail::to_text(expected_shape), " is needed");
  return to_floats();
}

}  // namespace commvq
