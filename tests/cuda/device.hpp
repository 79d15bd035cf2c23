#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "commvq/core/error.hpp"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

/// What tests on a device share.
namespace commvq::testing_support {

inline bool has_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

inline void check_cuda(cudaError_t error, const char* what) {
  require(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

/// An array in device memory.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t size) : size_(size) {
    void* memory = nullptr;
    check_cuda(cudaMalloc(&memory, std::max<std::size_t>(1, size) * sizeof(T)), "cudaMalloc");
    memory_ = {static_cast<T*>(memory), [](T* p) { cudaFree(p); }};
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { copy(values); }

  T* get() const { return memory_.get(); }
  std::size_t size() const { return size_; }
  void copy(const std::vector<T>& values) {
    check_cuda(cudaMemcpy(get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
               "copying to the device");
  }
  /// Fills every byte.
  void fill(int byte) { check_cuda(cudaMemset(get(), byte, size_ * sizeof(T)), "cudaMemset"); }
  std::vector<T> to_host() const {
    std::vector<T> values(size_);
    check_cuda(cudaMemcpy(values.data(), get(), size_ * sizeof(T), cudaMemcpyDeviceToHost),
               "copying from the device");
    return values;
  }

 private:
  std::size_t size_;
  std::shared_ptr<T> memory_;
};

}  // namespace commvq::testing_support

#define COMMVQ_NEEDS_DEVICE() \
  if (!::commvq::testing_support::has_device()) GTEST_SKIP() << "no CUDA device"
