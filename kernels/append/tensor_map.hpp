#pragma once

#include <cstdint>

#include "commvq/core/view.hpp"

#include <cuda.h>

namespace commvq::cuda {

/// Whether the driver makes tensor maps. Looks for it on the first call.
bool has_tensor_maps() noexcept;

/// How the copy engine reads fp16 operands [blocks][num_rows][num_inputs] of a matrix product:
/// boxes of 64 inputs of `box_rows` rows, rows of 128 bytes in the order of 128-byte swizzles,
/// zeros beyond the last input or row. `data` is device memory on 16 bytes, num_inputs a multiple
/// of 8, box_rows at most 256. False where the driver refuses.
bool make_operand_map(CUtensorMap& map, const std::uint16_t* data, Index num_inputs, Index num_rows,
                      Index num_blocks, int box_rows) noexcept;

}  // namespace commvq::cuda
