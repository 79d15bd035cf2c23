#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "commvq/core/error.hpp"

#include <cuda_runtime_api.h>

/// What preparing codebooks and encoders needs of the CUDA runtime. All throw `Error`.
namespace commvq::cuda {

inline void check(cudaError_t error, const std::string& what) {
  require(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

inline int attribute_of_current_device(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "asking what the device is");
  return value;
}

/// A copy in memory of the current device; `what` names it in errors.
inline std::shared_ptr<void> copy_to_device(const std::vector<std::uint8_t>& bytes,
                                            const std::string& what) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes.size()), "allocating device " + what);
  std::shared_ptr<void> owner(memory, [](void* p) { cudaFree(p); });
  check(cudaMemcpy(memory, bytes.data(), bytes.size(), cudaMemcpyHostToDevice),
        "copying " + what + " to the device");
  return owner;
}

}  // namespace commvq::cuda
