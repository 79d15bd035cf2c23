#pragma once

#include "commvq/cuda/page_layout.hpp"

namespace commvq::cuda {

/// Shared memory of the warp that polishes a code: four numbers a bit.
inline COMMVQ_HOST_DEVICE int polish_shared_bytes(int num_bits) {
  return 4 * 4 * num_bits;
}

}  // namespace commvq::cuda
