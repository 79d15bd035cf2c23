#pragma once

#include "commvq/cuda/page_layout.hpp"

namespace commvq::cuda {

/// Shared memory of a block that polishes a code: sums of its warps, then three numbers a bit.
inline constexpr int kPolishSumBytes = 32 * 8;
inline COMMVQ_HOST_DEVICE int polish_shared_bytes(int num_bits) {
  return kPolishSumBytes + 3 * 4 * num_bits;
}

}  // namespace commvq::cuda
