#pragma once

#include <cstdint>

#include "commvq/core/float16.hpp"
#include "commvq/cuda/page_layout.hpp"

namespace commvq::cuda {

/// Pages of codes of one layer, in device memory that the caller owns. Page p lies at
/// `data + p * page_stride`; a block table names the pages of a sequence.
struct PagedCodes {
  std::uint8_t* data = nullptr;  ///< device, on 16 bytes
  Index page_stride = 0;  ///< bytes, a multiple of 16, at least `DevicePageLayout::page_bytes`
};

/// Exact copies of the sinks and of the newest tokens of one layer, in device memory that the
/// caller owns: `[num_slots][rows_per_slot()][num_kv_heads * head_dim]`, keys before RoPE, in
/// channel order. A slot holds one sequence. All tokens have codes as well, so that an exact copy
/// may be overwritten at any time.
struct ExactTokens {
  void* keys = nullptr;               ///< device, on 16 bytes
  void* values = nullptr;             ///< device, on 16 bytes
  FloatType type = FloatType::kBf16;  ///< kBf16 or kFp16
  int sinks = 0;     ///< the first so many tokens of a sequence keep their copies for good
  int capacity = 0;  ///< rows for the newest of the others, used in turn

  COMMVQ_HOST_DEVICE int rows_per_slot() const { return sinks + capacity; }
  /// Row of token `token` of the sequence in slot `slot`.
  COMMVQ_HOST_DEVICE Index row(Index slot, Index token) const {
    const Index in_slot = token < sinks ? token : sinks + (token - sinks) % capacity;
    return slot * (sinks + capacity) + in_slot;
  }
};

}  // namespace commvq::cuda
