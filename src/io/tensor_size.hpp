#pragma once

#include <limits>
#include <string>
#include <vector>

#include "commvq/io/safetensors.hpp"

namespace commvq::detail {

/// A shape as text: "[2, 3]".
std::string to_text(const std::vector<Index>& shape);

/// Bytes of a tensor. `what` names it in messages. Throws `Error` for a negative dimension and for
/// a size beyond 2^63 - 1.
inline Index checked_bytes(Dtype dtype, const std::vector<Index>& shape, const std::string& what) {
  Index bytes = size_of(dtype);
  for (const Index extent : shape) {
    require(extent >= 0, what, ": shape ", to_text(shape), " has a negative dimension");
    require(!__builtin_mul_overflow(bytes, extent, &bytes), what, ": shape ", to_text(shape),
            " of ", name_of(dtype), " needs more than ", std::numeric_limits<Index>::max(),
            " bytes");
  }
  return bytes;
}

}  // namespace commvq::detail
