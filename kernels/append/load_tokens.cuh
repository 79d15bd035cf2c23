#pragma once

#include "common/sums.cuh"
#include "encoder_view.hpp"
#include "matrix_product.cuh"

namespace commvq::cuda {

/// Keys or values of one call, and where their exact copies go.
struct TokenRows {
  const void* data;  ///< [num_tokens][num_channels]
  FloatType type;
  void* exact;  ///< null: no copies
  FloatType exact_type;
  bool rounds;                        ///< to exact_type before anything else
  const std::int64_t* exact_mapping;  ///< null: no copies
  int num_channels;
  const float* channel_scales;  ///< [num_channels]: what is coded is divided by them; null: 1
};

__device__ __forceinline__ float widen(std::uint16_t bits, FloatType type) {
  return type == FloatType::kBf16 ? __uint_as_float(static_cast<std::uint32_t>(bits) << 16)
                                  : append_instructions::from_half(bits);
}
__device__ __forceinline__ float read_float(const void* data, FloatType type, Index i) {
  if (type == FloatType::kFp32) return static_cast<const float*>(data)[i];
  return widen(static_cast<const std::uint16_t*>(data)[i], type);
}
/// Bits of the nearest bf16, ties to even; NaN stays NaN.
__device__ __forceinline__ std::uint16_t bf16_of(float value) {
  const std::uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
__device__ __forceinline__ std::uint16_t rounded_bits(float value, FloatType type) {
  return type == FloatType::kBf16 ? bf16_of(value) : append_instructions::to_half(value);
}
__device__ __forceinline__ bool is_finite(float value) {
  return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u;
}
constexpr std::uint16_t kNanBf16 = 0x7fc0;

/// A number of a token as it is coded: rounded to the exact type, where there is one.
__device__ __forceinline__ float read_token(const TokenRows& rows, Index token, int channel) {
  float value = read_float(rows.data, rows.type, token * rows.num_channels + channel);
  if (rows.rounds && rows.type != rows.exact_type)
    value = widen(rounded_bits(value, rows.exact_type), rows.exact_type);
  return rows.channel_scales == nullptr ? value : value / rows.channel_scales[channel];
}

/// Norm of channels [first, first + count) in double, or NaN if one of them is not finite. Called
/// by all lanes of a warp.
__device__ __forceinline__ double norm_of(const TokenRows& rows, Index token, int first,
                                          int count) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  double sum = 0;
  bool finite = true;
  for (int i = lane; i < count; i += 32) {
    const float value = read_token(rows, token, first + i);
    finite = finite && is_finite(value);
    sum += static_cast<double>(value) * value;
  }
  sum = warp_sum(sum);
  return __all_sync(0xffffffffu, finite) ? sqrt(sum)
                                         : static_cast<double>(__uint_as_float(0x7fc00000u));
}

/// Writes the exact copy of a token's channels [first, first + count), if it has one.
__device__ __forceinline__ void copy_exactly(const TokenRows& rows, Index token, int first,
                                             int count) {
  if (rows.exact == nullptr || rows.exact_mapping == nullptr) return;
  const Index row = rows.exact_mapping[token];
  if (row < 0) return;
  auto* const to = static_cast<std::uint16_t*>(rows.exact) + row * rows.num_channels;
  for (int i = first + static_cast<int>(threadIdx.x) % 32; i < first + count; i += 32)
    to[i] = rounded_bits(read_float(rows.data, rows.type, token * rows.num_channels + i),
                         rows.exact_type);
}

/// A warp a token: exact copy, norms, weighted unit keys in planar order. `norms` and `unit_keys`
/// are those of the workspace; norms also go to the page.
__global__ void __launch_bounds__(kTokenThreads)
    load_keys(const __grid_constant__ EncoderView encoder, const TokenRows rows, Index num_tokens,
              PagedCodes pages, const std::int64_t* slot_mapping, std::uint16_t* norms,
              float* unit_keys) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Index token = Index{blockIdx.x} * (kTokenThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (token >= num_tokens) return;
  const DevicePageLayout& layout = encoder.layout;
  copy_exactly(rows, token, 0, rows.num_channels);
  const Index place = slot_mapping[token];
  const int per_norm = rows.num_channels / layout.norms_per_token;
  for (int n = 0; n < layout.norms_per_token; ++n) {
    const double norm = norm_of(rows, token, n * per_norm, per_norm);
    std::uint16_t bits = bf16_of(static_cast<float>(norm));
    if ((bits & 0x7f80) == 0x7f80) bits = kNanBf16;  // also where bf16 overflows
    if (lane == 0) {
      norms[token * layout.norms_per_token + n] = bits;
      if (place >= 0) {
        std::uint8_t* const page = pages.data + place / layout.page_size * pages.page_stride;
        const int slot = static_cast<int>(place % layout.page_size);
        *reinterpret_cast<std::uint16_t*>(page + layout.key_norm(n, slot)) = bits;
      }
    }
    const double rounded =
        static_cast<double>(__uint_as_float(static_cast<std::uint32_t>(bits) << 16));
    const double factor = rounded > 0 ? 1 / rounded : 0;  // 0 for NaN
    for (int i = lane; i < per_norm; i += 32) {
      const int at = n * per_norm + i;
      const int head_start = at / layout.head_dim * layout.head_dim;
      const int channel = head_start + encoder.keys.channels[at - head_start];
      float unit =
          factor == 0 ? 0.0f : static_cast<float>(read_token(rows, token, channel) * factor);
      if (encoder.keys.weights != nullptr) unit *= encoder.keys.weights[at];
      unit_keys[token * rows.num_channels + at] = unit;
    }
  }
}

/// What a warp works on: one block of one token's values.
struct ValueBlock {
  Index row;  ///< block * num_tokens + token
  Index token;
  int block;
  int first_channel;

  __device__ ValueBlock(const ValueEncoderView& values, Index num_tokens) {
    row = Index{blockIdx.x} * (kTokenThreads / 32) + static_cast<int>(threadIdx.x) / 32;
    block = static_cast<int>(row / num_tokens);
    token = row - block * num_tokens;
    first_channel = block * values.num_channels;
  }
};

/// Number `channel` of a block divided by its norm; 0 where the norm is 0 or NaN.
__device__ __forceinline__ float unit_value(const TokenRows& rows, const ValueBlock& at,
                                            int channel, double norm) {
  const double factor = norm > 0 ? 1 / norm : 0;
  return factor == 0
             ? 0.0f
             : static_cast<float>(read_token(rows, at.token, at.first_channel + channel) * factor);
}

/// A warp a row: exact copy, norm, LayerNorm of the unit value as the network's scaled input.
__global__ void __launch_bounds__(kTokenThreads)
    load_values(const __grid_constant__ EncoderView encoder, const TokenRows rows, Index num_tokens,
                double* norms, std::uint16_t* inputs) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const ValueEncoderView& values = encoder.values;
  const ValueBlock at(values, num_tokens);
  if (at.block >= values.num_blocks) return;
  const int count = values.num_channels;
  copy_exactly(rows, at.token, at.first_channel, count);
  const double norm = norm_of(rows, at.token, at.first_channel, count);
  if (lane == 0) norms[at.row] = norm;
  const auto unit = [&](int channel) { return unit_value(rows, at, channel, norm); };
  float sum = 0;
  for (int i = lane; i < count; i += 32) sum += unit(i);
  const float mean = warp_sum(sum) / static_cast<float>(count);
  float squares = 0;
  for (int i = lane; i < count; i += 32) squares += (unit(i) - mean) * (unit(i) - mean);
  const float variance = warp_sum(squares) / static_cast<float>(count);
  constexpr float kEpsilon = 1e-5f;  // kValueLayerNormEpsilon
  const float deviation = 1 / sqrtf(variance + kEpsilon);

  const int num_inputs = values.hidden.num_inputs;
  std::uint16_t* const hi = inputs + at.row * num_inputs;
  std::uint16_t* const lo = hi + values.num_blocks * num_tokens * num_inputs;
  const float* const gain = values.norm_gain + at.first_channel;
  const float* const bias = values.norm_bias + at.first_channel;
  for (int i = 2 * lane; i < num_inputs; i += 64) {
    float numbers[2] = {};
    for (int k = 0; k < 2; ++k)
      if (i + k < count)
        numbers[k] =
            values.input_scale * ((unit(i + k) - mean) * deviation * gain[i + k] + bias[i + k]);
    const std::uint32_t rounded = pack_halves(numbers[0], numbers[1]);
    *reinterpret_cast<std::uint32_t*>(hi + i) = rounded;
    if (values.num_terms() > 1)
      *reinterpret_cast<std::uint32_t*>(lo + i) = pack_rests(numbers[0], numbers[1], rounded);
  }
}

/// A warp a row: scale from the norm and the decoded length, and both scale and bits to the page.
/// `bits` [rows][stride] fp16, `squares` [num_tiles][rows].
__global__ void __launch_bounds__(kTokenThreads)
    write_values(const __grid_constant__ EncoderView encoder, Index num_tokens, const double* norms,
                 const std::uint16_t* bits, const float* squares, int num_tiles, PagedCodes pages,
                 const std::int64_t* slot_mapping) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const ValueEncoderView& values = encoder.values;
  const ValueBlock at(values, num_tokens);
  if (at.block >= values.num_blocks) return;
  const Index place = slot_mapping[at.token];
  if (place < 0) return;
  const DevicePageLayout& layout = encoder.layout;
  std::uint8_t* const page = pages.data + place / layout.page_size * pages.page_stride;
  const int slot = static_cast<int>(place % layout.page_size);

  double sum = 0;
  for (int tile = lane; tile < num_tiles; tile += 32)
    sum += static_cast<double>(squares[tile * values.num_blocks * num_tokens + at.row]);
  const double length = sqrt(warp_sum(sum)) * values.length_factor;
  const double norm = norms[at.row];
  // NaN norms stay NaN, also where the length is 0.
  const double scale = length > 0 ? norm / length : norm * 0;
  std::uint16_t scale_bits = bf16_of(static_cast<float>(scale));
  const bool finite = (scale_bits & 0x7f80) != 0x7f80;
  if (!finite) scale_bits = kNanBf16;
  if (lane == 0)
    *reinterpret_cast<std::uint16_t*>(page + layout.value_scale(at.block, slot)) = scale_bits;

  // A 64-bit word holds bit `slot` of four codes. Only this warp changes those bits, others change
  // others: exclusive-or with what differs sets them without touching the rest.
  auto* const words = reinterpret_cast<unsigned long long*>(page + layout.value_codes(slot)) +
                      at.block * (values.num_code_bits / 4);
  const auto* const code =
      reinterpret_cast<const uint2*>(bits + at.row * values.decoder.num_inputs);
  const int shift = slot % 16;
  const bool zero = !finite || norm == 0;
  for (int i = lane; i < values.num_code_bits / 4; i += 32) {
    const uint2 four = code[i];
    unsigned long long wanted = 0;
    if (!zero)  // 1 in fp16 is 0x3c00
      wanted = static_cast<unsigned long long>((four.x >> 10 & 0x00010001u)) |
               static_cast<unsigned long long>((four.y >> 10 & 0x00010001u)) << 32;
    wanted <<= shift;
    const unsigned long long mask = 0x0001000100010001ull << shift;
    const unsigned long long old = *const_cast<volatile unsigned long long*>(words + i);
    const unsigned long long change = (old ^ wanted) & mask;
    if (change != 0) atomicXor(words + i, change);
  }
}

}  // namespace commvq::cuda
