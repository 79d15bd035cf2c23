#pragma once

#include <cstdint>
#include <vector>

#include "commvq/io/codebook_file.hpp"

#include "encoder_view.hpp"

namespace commvq::cuda {

/// What a `DeviceEncoder` holds in device memory, gathered in host memory.
class EncoderImage {
 public:
  /// Throws `Error` for what `prepare_encoder` refuses, except for lack of shared memory.
  /// `by_warpgroups`: the device searches for key codes by warpgroups where it can.
  EncoderImage(const LayerCodec& codec, const DevicePageLayout& layout, ValuePrecision precision,
               bool by_warpgroups);

  const std::vector<std::uint8_t>& bytes() const { return bytes_; }
  /// The view whose pointers are offsets into `bytes`.
  const EncoderView& view() const { return view_; }
  /// The view of a copy of `bytes` at `base`.
  EncoderView view_at(const void* base) const;

 private:
  template <class T>
  void add(const T*& at, const std::vector<T>& values);
  void add_keys(const KeyCodec& codec, bool by_warpgroups);
  void add_key_search(const std::vector<KeyCodebook<float>>& codebooks, double row_scale);
  void add_search_stages(const std::vector<KeyCodebook<float>>& codebooks, double scale);
  void add_binary_search(const std::vector<KeyCodebook<float>>& codebooks, double largest_key);
  void add_values(const ValueCodec& codec, ValuePrecision precision);
  void add_polish(const ValueCodec& codec, const std::vector<float>& rows);
  void add_bias(Weights& weights, const std::vector<float>& bias);
  Weights add_weights(const std::vector<float>& weights, Index outputs, Index inputs,
                      double input_scale, ValuePrecision precision);

  std::vector<std::uint8_t> bytes_;
  EncoderView view_;
};

}  // namespace commvq::cuda
