#pragma once

#include <cstdint>

#include "common/mma.cuh"

namespace commvq::cuda::key_scores {

/// What a lane has decoded of two tokens: pairs 8k + 2q and 8k + 2q + 1, q = lane % 4, not yet
/// turned.
struct PairKeys {
  __half2 real[2];  ///< [token]
  __half2 imag[2];
};

}  // namespace commvq::cuda::key_scores
