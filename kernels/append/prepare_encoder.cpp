#include "commvq/core/error.hpp"

#include <cuda_runtime_api.h>

#include "encoder_image.hpp"

namespace commvq::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  require(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

}  // namespace

DeviceEncoder::DeviceEncoder() : view_(std::make_unique<EncoderView>()) {}
DeviceEncoder::DeviceEncoder(DeviceEncoder&&) noexcept = default;
DeviceEncoder& DeviceEncoder::operator=(DeviceEncoder&&) noexcept = default;
DeviceEncoder::~DeviceEncoder() = default;

const DevicePageLayout& DeviceEncoder::layout() const noexcept {
  return view_->layout;
}

DeviceEncoder prepare_encoder(const LayerCodec& codec, const DevicePageLayout& layout,
                              ValuePrecision precision) {
  DeviceEncoder result;
  EncoderImage image(codec, layout, precision);
  int device = 0, shared_bytes = 0, major = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "asking for the shared memory of a block");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "asking for the compute capability");
  // Fewer rows where the device has less shared memory.
  int num_search_rows = kKeySearch.num_rows;
  if (KeySearchShared(image.view().keys, num_search_rows).bytes > shared_bytes)
    num_search_rows = kKeySearch.num_rows_small;
  const Index needed = KeySearchShared(image.view().keys, num_search_rows).bytes;
  require(needed <= shared_bytes, "searching for the key codes needs ", needed,
          " bytes of shared memory, of which the device has ", shared_bytes,
          "; use smaller groups or codebooks, or fewer stages");
  void* memory = nullptr;
  check(cudaMalloc(&memory, image.bytes().size()), "allocating device encoders");
  result.memory_ = std::shared_ptr<void>(memory, [](void* p) { cudaFree(p); });
  check(cudaMemcpy(memory, image.bytes().data(), image.bytes().size(), cudaMemcpyHostToDevice),
        "copying encoders to the device");
  *result.view_ = image.view_at(memory);
  result.view_->keys.num_search_rows = num_search_rows;
  result.view_->has_warpgroups = major == 9;
  check(static_cast<cudaError_t>(configure_append_kernels()), "preparing the kernels of append");
  return result;
}

}  // namespace commvq::cuda
