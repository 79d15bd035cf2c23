#pragma once

#include "common/sums.cuh"
#include "encoder_view.hpp"
#include "matrix_product.cuh"
#include "write_keys.cuh"

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
/// Numbers i and, an even one, i + 1.
template <FloatType kType>
__device__ __forceinline__ float read_float(const void* data, Index i) {
  if constexpr (kType == FloatType::kFp32) return static_cast<const float*>(data)[i];
  return widen(static_cast<const std::uint16_t*>(data)[i], kType);
}
template <FloatType kType>
__device__ __forceinline__ float2 read_floats(const void* data, Index i) {
  if constexpr (kType == FloatType::kFp32)
    return *reinterpret_cast<const float2*>(static_cast<const float*>(data) + i);
  const std::uint32_t pair =
      *reinterpret_cast<const std::uint32_t*>(static_cast<const std::uint16_t*>(data) + i);
  return float2{widen(static_cast<std::uint16_t>(pair), kType),
                widen(static_cast<std::uint16_t>(pair >> 16), kType)};
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
/// A number of a channel as it is coded: rounded to the exact type, where there is one.
template <FloatType kType>
__device__ __forceinline__ float as_coded(const TokenRows& rows, int channel, float value) {
  if (rows.rounds && kType != rows.exact_type)
    value = widen(rounded_bits(value, rows.exact_type), rows.exact_type);
  return rows.channel_scales == nullptr ? value : value / rows.channel_scales[channel];
}
template <FloatType kType>
__device__ __forceinline__ float read_token(const TokenRows& rows, Index token, int channel) {
  return as_coded<kType>(rows, channel,
                         read_float<kType>(rows.data, token * rows.num_channels + channel));
}
/// Channels `channel`, an even one, and the next.
template <FloatType kType>
__device__ __forceinline__ float2 read_pair(const TokenRows& rows, Index token, int channel) {
  const float2 pair = read_floats<kType>(rows.data, token * rows.num_channels + channel);
  return float2{as_coded<kType>(rows, channel, pair.x), as_coded<kType>(rows, channel + 1, pair.y)};
}

/// Norm of an even number of channels [first, first + count) in double, or NaN if one of them is
/// not finite; `sum` receives their sum. Called by all lanes of a warp.
template <FloatType kType>
__device__ __forceinline__ double norm_of(const TokenRows& rows, Index token, int first, int count,
                                          double& sum) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  double squares = 0;
  float of_lane = 0;
  bool finite = true;
#pragma unroll 4
  for (int i = 2 * lane; i < count; i += 64) {
    const float2 pair = read_pair<kType>(rows, token, first + i);
    finite = finite && is_finite(pair.x) && is_finite(pair.y);
    squares += static_cast<double>(pair.x) * pair.x + static_cast<double>(pair.y) * pair.y;
    of_lane += pair.x + pair.y;
  }
  squares = warp_sum(squares);
  sum = warp_sum(static_cast<double>(of_lane));
  return __all_sync(0xffffffffu, finite) ? sqrt(squares)
                                         : static_cast<double>(__uint_as_float(0x7fc00000u));
}

/// Writes the exact copy of a token's channels [first, first + count), even numbers, if it has one.
template <FloatType kType>
__device__ __forceinline__ void copy_exactly(const TokenRows& rows, Index token, int first,
                                             int count) {
  if (rows.exact == nullptr || rows.exact_mapping == nullptr) return;
  const Index row = rows.exact_mapping[token];
  if (row < 0) return;
  auto* const to = static_cast<std::uint16_t*>(rows.exact) + row * rows.num_channels;
  for (int i = first + 2 * (static_cast<int>(threadIdx.x) % 32); i < first + count; i += 64) {
    const float2 pair = read_floats<kType>(rows.data, token * rows.num_channels + i);
    *reinterpret_cast<std::uint32_t*>(to + i) =
        rounded_bits(pair.x, rows.exact_type) |
        static_cast<std::uint32_t>(rounded_bits(pair.y, rows.exact_type)) << 16;
  }
}

/// A warp a token: exact copies of what there is.
template <FloatType kType>
__global__ void __launch_bounds__(kTokenThreads)
    copy_tokens(const TokenRows keys, const TokenRows values, Index num_tokens) {
  const Index token = Index{blockIdx.x} * (kTokenThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (token >= num_tokens) return;
  if (keys.data != nullptr) copy_exactly<kType>(keys, token, 0, keys.num_channels);
  if (values.data != nullptr) copy_exactly<kType>(values, token, 0, values.num_channels);
}

/// What a warp works on: a token in the grid's x, a part of its channels in y.
struct TokenPart {
  Index token;
  int part;
  Index row;  ///< part * num_tokens + token
  int first_channel, num_channels;

  __device__ TokenPart(int channels_of_part, Index num_tokens)
      : token(Index{blockIdx.x} * (kTokenThreads / 32) + static_cast<int>(threadIdx.x) / 32),
        part(static_cast<int>(blockIdx.y)),
        row(part * num_tokens + token),
        first_channel(part * channels_of_part),
        num_channels(channels_of_part) {}
};

/// The channels of a norm, a warp each: exact copy, norm, weighted unit key in planar order.
/// `norms` and `unit_keys` are those of the workspace; norms also go to the page.
template <FloatType kType>
__global__ void __launch_bounds__(kTokenThreads)
    load_keys(const __grid_constant__ EncoderView encoder, const TokenRows rows, Index num_tokens,
              PagedCodes pages, const std::int64_t* slot_mapping, std::uint16_t* norms,
              float* unit_keys) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const DevicePageLayout& layout = encoder.layout;
  const TokenPart at(rows.num_channels / layout.norms_per_token, num_tokens);
  if (at.token >= num_tokens) return;
  copy_exactly<kType>(rows, at.token, at.first_channel, at.num_channels);
  double sum = 0;
  const double norm = norm_of<kType>(rows, at.token, at.first_channel, at.num_channels, sum);
  std::uint16_t bits = bf16_of(static_cast<float>(norm));
  if ((bits & 0x7f80) == 0x7f80) bits = kNanBf16;  // also where bf16 overflows
  if (lane == 0) {
    norms[at.token * layout.norms_per_token + at.part] = bits;
    if (slot_mapping[at.token] >= 0) {
      const PagePlace place(layout, pages, slot_mapping[at.token]);
      *reinterpret_cast<std::uint16_t*>(place.page + layout.key_norm(at.part, place.slot)) = bits;
    }
  }
  const double rounded =
      static_cast<double>(__uint_as_float(static_cast<std::uint32_t>(bits) << 16));
  const double factor = rounded > 0 ? 1 / rounded : 0;  // 0 for NaN
  // Of a head's channels in planar order the next one is mostly the next channel.
  float* const units = unit_keys + at.token * rows.num_channels;
#pragma unroll 2
  for (int i = 2 * lane; i < at.num_channels; i += 64) {
    const int planar = at.first_channel + i;
    const int in_head = planar % layout.head_dim;
    const std::uint16_t* const channels = encoder.keys.channels + in_head;
    const int first = planar - in_head + channels[0], second = planar - in_head + channels[1];
    float2 number{0, 0};
    if (factor != 0)
      number = first % 2 == 0 && second == first + 1
                   ? read_pair<kType>(rows, at.token, first)
                   : float2{read_token<kType>(rows, at.token, first),
                            read_token<kType>(rows, at.token, second)};
    float2 unit{static_cast<float>(number.x * factor), static_cast<float>(number.y * factor)};
    if (encoder.keys.weights != nullptr) {
      unit.x *= encoder.keys.weights[planar];
      unit.y *= encoder.keys.weights[planar + 1];
    }
    *reinterpret_cast<float2*>(units + planar) = unit;
  }
}

/// Two neighbouring numbers as operands, and what fp16 leaves of them in row `lo`, unless null.
__device__ __forceinline__ void store_operands(std::uint16_t* hi, std::uint16_t* lo, int column,
                                               float first, float second) {
  const std::uint32_t rounded = pack_halves(first, second);
  *reinterpret_cast<std::uint32_t*>(hi + column) = rounded;
  if (lo != nullptr)
    *reinterpret_cast<std::uint32_t*>(lo + column) = pack_rests(first, second, rounded);
}

/// A block of values, a warp each: exact copy, norm, LayerNorm of the unit value as the network's
/// scaled input, and for a polish (`units` not null) the unit value itself.
template <FloatType kType>
__global__ void __launch_bounds__(kTokenThreads, kTokenBlocks)
    load_values(const __grid_constant__ EncoderView encoder, const TokenRows rows, Index num_tokens,
                double* norms, std::uint16_t* inputs, std::uint16_t* units) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const ValueEncoderView& values = encoder.values;
  const TokenPart at(values.num_channels, num_tokens);
  if (at.token >= num_tokens) return;
  const int count = values.num_channels;
  copy_exactly<kType>(rows, at.token, at.first_channel, count);
  double sum = 0;
  const double norm = norm_of<kType>(rows, at.token, at.first_channel, count, sum);
  if (lane == 0) norms[at.row] = norm;
  const double factor = norm > 0 ? 1 / norm : 0;  // 0 for NaN
  const bool is_coded = factor != 0;
  // Of a value of norm 1 the squares have the sum 1.
  const float mean = is_coded ? static_cast<float>(sum * factor / count) : 0.0f;
  const float square = is_coded ? 1 / static_cast<float>(count) : 0.0f;
  constexpr float kEpsilon = 1e-5f;  // kValueLayerNormEpsilon
  const float deviation = 1 / sqrtf(max(square - mean * mean, 0.0f) + kEpsilon);

  const Index num_rows = values.num_blocks * num_tokens;
  const auto row_of = [&](std::uint16_t* operands, int part, int stride) {
    return operands + (part * num_rows + at.row) * stride;
  };
  const int num_inputs = values.hidden.num_inputs;
  std::uint16_t* const hi = row_of(inputs, 0, num_inputs);
  std::uint16_t* const lo = values.num_terms() > 1 ? row_of(inputs, 1, num_inputs) : nullptr;
  const float* const gain = values.norm_gain + at.first_channel;
  const float* const bias = values.norm_bias + at.first_channel;
  for (int i = 2 * lane; i < num_inputs; i += 64) {
    const bool is_there = i < count;
    const float2 number = is_coded && is_there
                              ? read_pair<kType>(rows, at.token, at.first_channel + i)
                              : float2{0, 0};
    const float2 unit{static_cast<float>(number.x * factor), static_cast<float>(number.y * factor)};
    float2 input{0, 0};
    if (is_there)
      input =
          float2{values.input_scale * ((unit.x - mean) * deviation * gain[i] + bias[i]),
                 values.input_scale * ((unit.y - mean) * deviation * gain[i + 1] + bias[i + 1])};
    store_operands(hi, lo, i, input.x, input.y);
    if (units != nullptr)
      store_operands(row_of(units, 0, num_inputs), row_of(units, 1, num_inputs), i,
                     values.unit_scale * unit.x, values.unit_scale * unit.y);
  }
}

/// A block of values, a warp each: scale from the norm and the decoded length, and both scale and
/// bits to the page. `bits` [rows][stride] fp16, `squares` [num_tiles][rows].
__global__ void __launch_bounds__(kTokenThreads)
    write_values(const __grid_constant__ EncoderView encoder, Index num_tokens, const double* norms,
                 const std::uint16_t* bits, const float* squares, int num_tiles, PagedCodes pages,
                 const std::int64_t* slot_mapping) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const ValueEncoderView& values = encoder.values;
  const TokenPart at(values.num_channels, num_tokens);
  if (at.token >= num_tokens || slot_mapping[at.token] < 0) return;
  const DevicePageLayout& layout = encoder.layout;
  const PagePlace place(layout, pages, slot_mapping[at.token]);

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
    *reinterpret_cast<std::uint16_t*>(place.page + layout.value_scale(at.part, place.slot)) =
        scale_bits;

  // A 64-bit word holds bit `slot` of four codes. Only this warp changes those bits, others change
  // others: exclusive-or with what differs sets them without touching the rest.
  auto* const words =
      reinterpret_cast<unsigned long long*>(place.page + layout.value_codes(place.slot)) +
      at.part * (values.num_code_bits / 4);
  const auto* const code =
      reinterpret_cast<const uint2*>(bits + at.row * values.decoder.num_inputs);
  const int shift = place.slot % 16;
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
