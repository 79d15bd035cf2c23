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
  int processors = 0;
  check(static_cast<cudaError_t>(find_warpgroup_processors(processors)),
        "looking for the device's warpgroups");
  EncoderImage image(codec, layout, precision, processors > 0);
  const int shared_bytes = attribute_of_current_device(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const KeyEncoderView& keys = image.view().keys;
  int num_search_rows = kKeySearch.num_rows;
  if (keys.rows != nullptr) {  // otherwise another search takes their place
    // Fewer rows where the device has less shared memory.
    if (KeySearchShared(keys, num_search_rows).bytes > shared_bytes)
      num_search_rows = kKeySearch.num_rows_small;
    const Index needed = KeySearchShared(keys, num_search_rows).bytes;
    require(needed <= shared_bytes, "searching for the key codes needs ", needed,
            " bytes of shared memory, of which the device has ", shared_bytes,
            "; use smaller groups or codebooks, or fewer stages");
  }
  const ValueEncoderView& values = image.view().values;
  require(values.polish_sweeps == 0 || polish_shared_bytes(values.num_code_bits) <= shared_bytes,
          "the polish of ", values.num_code_bits, " value code bits needs ",
          polish_shared_bytes(values.num_code_bits),
          " bytes of shared memory, of which the device has ", shared_bytes,
          "; set polish_sweeps to 0");
  DeviceEncoder result;
  result.memory_ = copy_to_device(image.bytes(), "encoders");
  *result.view_ = image.view_at(result.memory_.get());
  result.view_->keys.num_search_rows = num_search_rows;
  result.view_->warpgroup_processors = processors;
  check(static_cast<cudaError_t>(configure_append_kernels(*result.view_)),
        "preparing the kernels of append");
  return result;
}

}  // namespace commvq::cuda
