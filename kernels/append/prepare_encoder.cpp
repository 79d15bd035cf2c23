#include "common/device_memory.hpp"
#include "common/polish_memory.hpp"
#include "encoder_image.hpp"

namespace commvq::cuda {

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
  const int shared_bytes = attribute_of_current_device(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  // Fewer rows where the device has less shared memory.
  int num_search_rows = kKeySearch.num_rows;
  if (KeySearchShared(image.view().keys, num_search_rows).bytes > shared_bytes)
    num_search_rows = kKeySearch.num_rows_small;
  const Index needed = KeySearchShared(image.view().keys, num_search_rows).bytes;
  require(needed <= shared_bytes, "searching for the key codes needs ", needed,
          " bytes of shared memory, of which the device has ", shared_bytes,
          "; use smaller groups or codebooks, or fewer stages");
  const ValueEncoderView& values = image.view().values;
  require(values.polish_sweeps == 0 || polish_shared_bytes(values.num_code_bits) <= shared_bytes,
          "the polish of ", values.num_code_bits, " value code bits needs ",
          polish_shared_bytes(values.num_code_bits),
          " bytes of shared memory, of which the device has ", shared_bytes,
          "; set polish_sweeps to 0");
  result.memory_ = copy_to_device(image.bytes(), "encoders");
  *result.view_ = image.view_at(result.memory_.get());
  result.view_->keys.num_search_rows = num_search_rows;
  check(static_cast<cudaError_t>(configure_append_kernels(*result.view_)),
        "preparing the kernels of append");
  return result;
}

}  // namespace commvq::cuda
