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
/// Eight numbers that lie on 16 bytes.
struct Eight {
  float numbers[8];
  __device__ float& operator[](int i) { return numbers[i]; }
  __device__ float operator[](int i) const { return numbers[i]; }
};
template <FloatType kType>
__device__ __forceinline__ float read_float(const void* data, Index i) {
  if constexpr (kType == FloatType::kFp32) return static_cast<const float*>(data)[i];
  return widen(static_cast<const std::uint16_t*>(data)[i], kType);
}
__device__ __forceinline__ Eight read_floats(const float* data) {
  const float4 low = *reinterpret_cast<const float4*>(data);
  const float4 high = *reinterpret_cast<const float4*>(data + 4);
  return Eight{{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}
template <FloatType kType>
__device__ __forceinline__ Eight read_eight(const void* data, Index i) {
  if constexpr (kType == FloatType::kFp32) return read_floats(static_cast<const float*>(data) + i);
  const uint4 pairs = *reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(data) + i);
  const std::uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
  Eight result;
#pragma unroll
  for (int k = 0; k < 8; ++k)
    result[k] = widen(static_cast<std::uint16_t>(words[k / 2] >> (k % 2 * 16)), kType);
  return result;
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
/// Whether numbers are coded otherwise than they are.
template <FloatType kType>
__device__ __forceinline__ bool changes(const TokenRows& rows) {
  return (rows.rounds && kType != rows.exact_type) || rows.channel_scales != nullptr;
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
/// Eight channels from `channel` on, a multiple of eight.
template <FloatType kType>
__device__ __forceinline__ Eight read_channels(const TokenRows& rows, Index token, int channel) {
  Eight result = read_eight<kType>(rows.data, token * rows.num_channels + channel);
  if (changes<kType>(rows))
    for (int k = 0; k < 8; ++k) result[k] = as_coded<kType>(rows, channel + k, result[k]);
  return result;
}

/// Norm of channels [first, first + count), multiples of eight, in double, or NaN if one of them is
/// not finite; `sum` receives their sum. Called by all lanes of a warp.
template <FloatType kType>
__device__ __forceinline__ double norm_of(const TokenRows& rows, Index token, int first, int count,
                                          double& sum) {
  double squares = 0;
  float of_lane = 0;
  bool finite = true;
#pragma unroll 4
  for (int i = 8 * (static_cast<int>(threadIdx.x) % 32); i < count; i += 256) {
    const Eight eight = read_channels<kType>(rows, token, first + i);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      finite = finite && is_finite(eight[k]);
      squares += static_cast<double>(eight[k]) * eight[k];
      of_lane += eight[k];
    }
  }
  squares = warp_sum(squares);
  sum = warp_sum(static_cast<double>(of_lane));
  return __all_sync(0xffffffffu, finite) ? sqrt(squares)
                                         : static_cast<double>(__uint_as_float(0x7fc00000u));
}

/// Writes the exact copy of a token's channels [first, first + count), multiples of eight, if it
/// has one.
template <FloatType kType>
__device__ __forceinline__ void copy_exactly(const TokenRows& rows, Index token, int first,
                                             int count) {
  if (rows.exact == nullptr || rows.exact_mapping == nullptr) return;
  const Index row = rows.exact_mapping[token];
  if (row < 0) return;
  auto* const to = static_cast<std::uint16_t*>(rows.exact) + row * rows.num_channels;
  for (int i = first + 8 * (static_cast<int>(threadIdx.x) % 32); i < first + count; i += 256) {
    const Eight eight = read_eight<kType>(rows.data, token * rows.num_channels + i);
    std::uint32_t words[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      words[k] = rounded_bits(eight[2 * k], rows.exact_type) |
                 static_cast<std::uint32_t>(rounded_bits(eight[2 * k + 1], rows.exact_type)) << 16;
    *reinterpret_cast<uint4*>(to + i) = uint4{words[0], words[1], words[2], words[3]};
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

/// What a warp works on: a token in the grid's x, and a part of its channels.
struct TokenPart {
  Index token;
  int part;
  Index row;  ///< part * num_tokens + token
  int first_channel, num_channels;

  __device__ TokenPart(int part_, int channels_of_part, Index num_tokens)
      : token(Index{blockIdx.x} * (kTokenThreads / 32) + static_cast<int>(threadIdx.x) / 32),
        part(part_),
        row(part * num_tokens + token),
        first_channel(part * channels_of_part),
        num_channels(channels_of_part) {}
};

/// The channels of a norm: exact copy, norm, weighted unit key in planar order. `norms` and
/// `unit_keys` are those of the workspace; norms also go to the page.
template <FloatType kType>
__device__ __forceinline__ void load_key(const EncoderView& encoder, const TokenRows& rows,
                                         const TokenPart& at, const PagedCodes& pages,
                                         const std::int64_t* slot_mapping, std::uint16_t* norms,
                                         float* unit_keys) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const DevicePageLayout& layout = encoder.layout;
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
  // Of a head's channels in planar order the next ones are mostly the next channels.
  for (int i = 8 * lane; i < at.num_channels; i += 256) {
    const int planar = at.first_channel + i;
    const int in_head = planar % layout.head_dim;
    const std::uint16_t* const channels = encoder.keys.channels + in_head;
    Eight eight;
    if (channels[0] % 8 == 0 && channels[7] == channels[0] + 7) {
      eight = read_channels<kType>(rows, at.token, planar - in_head + channels[0]);
    } else {
      for (int k = 0; k < 8; ++k)
        eight[k] = read_token<kType>(rows, at.token, planar - in_head + channels[k]);
    }
#pragma unroll
    for (int k = 0; k < 8; ++k)
      eight[k] = factor == 0 ? 0.0f : static_cast<float>(eight[k] * factor);
    if (encoder.keys.weights != nullptr) {
      const Eight weights = read_floats(encoder.keys.weights + planar);
#pragma unroll
      for (int k = 0; k < 8; ++k) eight[k] *= weights[k];
    }
    auto* const to = reinterpret_cast<float4*>(unit_keys + at.token * rows.num_channels + planar);
    to[0] = float4{eight[0], eight[1], eight[2], eight[3]};
    to[1] = float4{eight[4], eight[5], eight[6], eight[7]};
  }
}

/// Eight neighbouring numbers as operands, and what fp16 leaves of them in row `lo`, unless null.
__device__ __forceinline__ void store_operands(std::uint16_t* hi, std::uint16_t* lo, int column,
                                               const Eight& numbers) {
  std::uint32_t rounded[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) rounded[k] = pack_halves(numbers[2 * k], numbers[2 * k + 1]);
  *reinterpret_cast<uint4*>(hi + column) = uint4{rounded[0], rounded[1], rounded[2], rounded[3]};
  if (lo == nullptr) return;
  std::uint32_t rests[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) rests[k] = pack_rests(numbers[2 * k], numbers[2 * k + 1], rounded[k]);
  *reinterpret_cast<uint4*>(lo + column) = uint4{rests[0], rests[1], rests[2], rests[3]};
}

/// A block of values: exact copy, norm, LayerNorm of the unit value as the network's scaled input,
/// and for a polish (`units` not null) the unit value itself.
template <FloatType kType>
__device__ __forceinline__ void load_value(const EncoderView& encoder, const TokenRows& rows,
                                           const TokenPart& at, Index num_tokens, double* norms,
                                           std::uint16_t* inputs, std::uint16_t* units) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const ValueEncoderView& values = encoder.values;
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
  for (int i = 8 * lane; i < num_inputs; i += 256) {
    Eight unit{}, input{};
    if (i < count) {
      if (is_coded) unit = read_channels<kType>(rows, at.token, at.first_channel + i);
      const Eight gains = read_floats(gain + i), biases = read_floats(bias + i);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        unit[k] = static_cast<float>(unit[k] * factor);
        input[k] = values.input_scale * ((unit[k] - mean) * deviation * gains[k] + biases[k]);
      }
    }
    store_operands(hi, lo, i, input);
    if (units == nullptr) continue;
#pragma unroll
    for (int k = 0; k < 8; ++k) unit[k] *= values.unit_scale;
    store_operands(row_of(units, 0, num_inputs), row_of(units, 1, num_inputs), i, unit);
  }
}

/// Keys and values, a warp a part: grid (blocks of tokens, norms of a key, then blocks of a value).
/// Without keys `key_parts` is 0.
template <FloatType kType>
__global__ void __launch_bounds__(kTokenThreads, kTokenBlocks)
    load_tokens(const __grid_constant__ EncoderView encoder, const TokenRows keys,
                const TokenRows values, Index num_tokens, int key_parts, PagedCodes pages,
                const std::int64_t* slot_mapping, const AppendWorkspace workspace) {
  const int part = static_cast<int>(blockIdx.y);
  if (part < key_parts) {
    const TokenPart at(part, keys.num_channels / encoder.layout.norms_per_token, num_tokens);
    if (at.token < num_tokens)
      load_key<kType>(encoder, keys, at, pages, slot_mapping, workspace.key_norms,
                      workspace.unit_keys);
  } else {
    const TokenPart at(part - key_parts, encoder.values.num_channels, num_tokens);
    if (at.token < num_tokens)
      load_value<kType>(encoder, values, at, num_tokens, workspace.value_norms, workspace.inputs,
                        workspace.units);
  }
}

}  // namespace commvq::cuda
