#pragma once

#include <cstdint>
#include <vector>

#include "commvq/cuda/device_codebooks.hpp"
#include "commvq/key_codec/key_codec.hpp"
#include "commvq/rope/rope.hpp"

namespace commvq::cuda {

/// What `BinaryKeys` points to, in host memory.
struct BinaryKeyImage {
  BinaryKeys keys;  ///< without pointers
  std::vector<std::uint16_t> high_entries, low_entries, turns;
  std::vector<float> node_weights, high_factors, low_factors;

  /// `layout` must be binary.
  BinaryKeyImage(const KeyCodec& codec, const Rope& rope, const DevicePageLayout& layout);
};

}  // namespace commvq::cuda
