#pragma once

#include <vector>

#include "commvq/core/view.hpp"

#include "common/device_memory.hpp"

namespace commvq::cuda {

/// An array in memory of the current device. Starts uninitialised; copies are ordered by a stream
/// and done when the call returns. All throw `Error`.
template <class T>
class DeviceArray {
 public:
  DeviceArray() = default;
  explicit DeviceArray(Index size) : size_(size) {
    void* memory = nullptr;
    if (size > 0)
      check(cudaMalloc(&memory, bytes(size)),
            "allocating " + std::to_string(bytes(size)) + " bytes on the device");
    owner_.reset(static_cast<T*>(memory));
  }

  T* data() const { return owner_.get(); }
  Index size() const { return size_; }

  void upload(const T* from, Index count, cudaStream_t stream) {
    copy(owner_.get(), from, count, cudaMemcpyHostToDevice, stream);
  }
  void download(T* to, Index count, cudaStream_t stream) const {
    copy(to, owner_.get(), count, cudaMemcpyDeviceToHost, stream);
  }
  std::vector<T> download(cudaStream_t stream) const {
    std::vector<T> result(static_cast<std::size_t>(size_));
    download(result.data(), size_, stream);
    return result;
  }
  void clear(cudaStream_t stream) {
    check(cudaMemsetAsync(owner_.get(), 0, bytes(size_), stream), "clearing device memory");
  }

 private:
  struct Free {
    void operator()(T* memory) const { cudaFree(memory); }
  };
  static std::size_t bytes(Index count) { return static_cast<std::size_t>(count) * sizeof(T); }
  void copy(T* to, const T* from, Index count, cudaMemcpyKind kind, cudaStream_t stream) const {
    require(count <= size_, "copying ", count, " elements; the device array has ", size_);
    check(cudaMemcpyAsync(to, from, bytes(count), kind, stream), "copying to or from the device");
    check(cudaStreamSynchronize(stream), "waiting for the device");
  }

  std::unique_ptr<T, Free> owner_;
  Index size_ = 0;
};

}  // namespace commvq::cuda
