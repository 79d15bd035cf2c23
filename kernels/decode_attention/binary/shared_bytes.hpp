#pragma once

#include "commvq/cuda/device_codebooks.hpp"

namespace commvq::cuda {

/// Shared memory that a thread block of the kernel for binary codes takes.
int binary_attention_bytes(const BinaryKeys& keys);

}  // namespace commvq::cuda
