#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "commvq/cuda/page_layout.hpp"
#include "commvq/cuda/paged_cache.hpp"
#include "commvq/cuda/status.hpp"

struct CUstream_st;

namespace commvq {
struct LayerCodec;
}

namespace commvq::cuda {

struct EncoderView;

/// Arithmetic of the value network's matrix products. Sums are fp32 in both.
enum class ValuePrecision {
  kFp16,  ///< operands rounded to fp16: a code differs from the host's where two logits are within
          ///< about 1e-3 of their size
  kFp32,  ///< operands as two fp16 numbers each, 22 bits together: three times the work
};

/// The encoders of one layer on the device, made once by `prepare_encoder`. Owns its device memory;
/// moves, does not copy. Any number of streams may read it at once; it must outlive the work that
/// does.
class DeviceEncoder {
 public:
  DeviceEncoder(DeviceEncoder&&) noexcept;
  DeviceEncoder& operator=(DeviceEncoder&&) noexcept;
  ~DeviceEncoder();

  const DevicePageLayout& layout() const noexcept;
  const EncoderView& view() const noexcept { return *view_; }

 private:
  friend DeviceEncoder prepare_encoder(const LayerCodec& codec, const DevicePageLayout& layout,
                                       ValuePrecision precision);
  DeviceEncoder();
  std::unique_ptr<EncoderView> view_;
  std::shared_ptr<void> memory_;
};

/// Copies a layer's encoders to the current device. `layout` is that of the pages to be written
/// (`DeviceCodebooks::layout()`); the beam width is that of the key codec's configuration, at most
/// 16. Allocates and synchronises. Throws `Error` unless both sides of the codec are there and fit
/// the layout, for shapes that the kernels do not support and for CUDA errors.
DeviceEncoder prepare_encoder(const LayerCodec& codec, const DevicePageLayout& layout,
                              ValuePrecision precision = ValuePrecision::kFp16);

/// One call of `append`. All pointers are device memory that the caller owns; what they point to is
/// read while the work runs, so a captured graph replays with new tokens and pages.
struct AppendParams {
  Index num_tokens = 0;
  const void* keys = nullptr;    ///< [num_tokens][num_kv_heads * head_dim], on 16 bytes, channel
                                 ///< order, before RoPE; null: keys stay as they are in the pages
  const void* values = nullptr;  ///< likewise; null: values stay as they are
  FloatType type = FloatType::kBf16;  ///< of keys and values: kBf16, kFp16 or kFp32
  /// [num_tokens]: page * page_size + slot within the page. Negative: no codes are written. Two
  /// tokens of one call must not have the same place. Null: nothing is coded, only exact copies are
  /// made, which needs neither pages nor a workspace; see "Coding later" in docs/cuda.md.
  const std::int64_t* slot_mapping = nullptr;
  PagedCodes pages;

  /// Where exact copies go; keys and values null: nowhere. If given, every token is rounded to
  /// `exact.type` before it is coded, so that a code does not depend on when it is made.
  ExactTokens exact;
  /// [num_tokens]: row of the exact buffers (see `ExactTokens::row`). Negative: no copy. Null: no
  /// copy of any token, but all are rounded to `exact.type`. Rows must differ, as places must.
  const std::int64_t* exact_mapping = nullptr;

  void* workspace = nullptr;  ///< on 256 bytes; calls that may overlap need one each
  std::size_t workspace_bytes = 0;
  CUstream_st* stream = nullptr;
};

/// Bytes that `append` needs beside its arguments for up to `max_tokens` tokens a call. The
/// contents need not be kept between calls, nor be initialised.
std::size_t append_workspace_size(const DeviceEncoder& encoder, Index max_tokens) noexcept;

/// Codes tokens and writes them to their pages, as `put_token` does; copies them to the exact
/// buffers. Bits of other tokens keep their value, whether or not they are in the same word.
///
/// Enqueues work on the stream and returns; never allocates, synchronises, prints or throws. May be
/// captured in a graph: num_tokens and the pointers are then fixed, what they point to may change.
/// The result does not depend on what else runs. A token's codes do not depend on the other tokens of
/// the call; its value scale may by one step of bf16, where its fp32 sum is at the edge of a step.
///
/// A key that is not finite, or whose norm is beyond bf16's range, is coded as zeros with norm NaN:
/// every score with it is NaN. Likewise a value with scale NaN. Both after rounding to
/// `exact.type`.
///
/// Returns kInvalidArgument, kWorkspaceTooSmall or kCudaError (of a launch: the stream may then
/// hold a part of the work), or kOk.
[[nodiscard]] Status append(const DeviceEncoder& encoder, const AppendParams& params) noexcept;

}  // namespace commvq::cuda
