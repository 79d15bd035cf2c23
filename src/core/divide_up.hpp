#pragma once

namespace commvq {

/// Units that hold `value`, neither of them negative.
template <class Integer>
constexpr Integer divide_up(Integer value, Integer unit) {
  return (value + unit - 1) / unit;
}

}  // namespace commvq
