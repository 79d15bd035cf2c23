#pragma once

#include <cstdint>
#include <vector>

#include "commvq/cuda/device_codebooks.hpp"
#include "commvq/key_codec/key_codec.hpp"
#include "commvq/rope/rope.hpp"

namespace commvq::cuda {

/// True if the codec's keys are binary codes that the decode kernel for them supports: books of two
/// rows over whole heads of 128 channels, 120 or 248 of them, and values with a block a head.
bool are_binary(const DevicePageLayout& layout);

/// What `BinaryKeys` points to, in host memory.
struct BinaryKeyImage {
  BinaryKeys keys;  ///< without pointers
  std::vector<std::uint16_t> high_entries, low_entries, turns;
  std::vector<float> node_weights, high_factors, low_factors;

  /// `layout` must be one of which `are_binary` is true.
  BinaryKeyImage(const KeyCodec& codec, const Rope& rope, const DevicePageLayout& layout);
};

}  // namespace commvq::cuda
