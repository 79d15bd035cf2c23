#pragma once

#include "load_tokens.cuh"
#include "write_keys.cuh"

namespace commvq::cuda {

/// Writes a block's code bits, 0 or 1 in fp16, sixteen of them to a word of the token's own.
__device__ __forceinline__ void write_graded_code(const DevicePageLayout& layout,
                                                  const PagePlace& place, int block, int num_bits,
                                                  const std::uint16_t* bits, bool zero) {
  for (int i = threadIdx.x % 32; i < num_bits / 16; i += 32) {
    std::uint32_t word = 0;
#pragma unroll
    for (int bit = 0; bit < 16; ++bit)
      word |= static_cast<std::uint32_t>(bits[16 * i + bit] != 0) << (15 - bit);
    const Index target = layout.value_bit(block * num_bits + 16 * i + 15, place.slot) / 8;
    *reinterpret_cast<std::uint16_t*>(place.page + target) =
        static_cast<std::uint16_t>(zero ? 0 : word);
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
  const TokenPart at(static_cast<int>(blockIdx.y), values.num_channels, num_tokens);
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

  const bool zero = !finite || norm == 0;
  if (layout.graded) {
    write_graded_code(layout, place, at.part, values.num_code_bits,
                      bits + at.row * values.decoder.num_inputs, zero);
    return;
  }
  // A 64-bit word holds bit `slot` of four codes. Only this warp changes those bits, others change
  // others: exclusive-or with what differs sets them without touching the rest.
  auto* const words =
      reinterpret_cast<unsigned long long*>(place.page + layout.value_codes(place.slot)) +
      at.part * (values.num_code_bits / 4);
  const auto* const code =
      reinterpret_cast<const uint2*>(bits + at.row * values.decoder.num_inputs);
  const int shift = place.slot % 16;
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
