#pragma once

#include "common/sums.cuh"
#include "encoder_view.hpp"
#include "instructions.cuh"
#include "load_tokens.cuh"
#include "write_keys.cuh"

namespace commvq::cuda {

// The beam search of `KeyEncoder` for books of two centroids. A key is coded as bases, one a stage,
// plus what the bits switch on; of a candidate with bits s in the stages before, and r what they
// leave of the key, the extension with bits a and b of the stage has the error
//     |r|^2 + e_base + a e_a + b e_b + 2 a b <d_a, d_b>,
//     e_x = (-2 <key, x> + offset_x) + sum over the bits s_i: 2 s_i <d_i, x>,
// so that no r is ever needed. The brackets are a matrix product of the block's keys. The sums over
// the bits of earlier bytes (four stages) are one of bits, exact in fp16, and grams; those over
// earlier stages of the byte are kept up to date.
//
// A warp has two tokens, rows 0-7 and 8-15 of its matrix instructions. Lane 4c + t is extension
// (c, t / 2, t % 2), t = 2a + b, of candidate c; it also keeps the terms of the byte's stage t of
// the candidate and the bits of stage t of all bytes, just as the instruction wants and gives them.

/// What a lane keeps of a token's candidate.
template <int kWords>
struct BinaryCandidate {
  float error;
  float of_base, of_a, of_b;      ///< e of stage t of the byte
  std::uint32_t history[kWords];  ///< bits 2 byte and 2 byte + 1: a and b of stage t of the byte
};

/// The bits a and b of a history as two fp16 numbers.
__device__ __forceinline__ std::uint32_t bits_as_halves(std::uint32_t history) {
  return ((history & 1) | (history & 2) << 15) * 0x3c00u;
}

/// Fills the products of the block's tokens with all columns of a head: a warp two tiles of 8
/// columns at a time.
__device__ __forceinline__ void multiply_binary_keys(const KeyEncoderView& keys,
                                                     const BinarySearchShared& at,
                                                     unsigned char* memory, int head) {
  using namespace append_instructions;
  const BinarySearchView& binary = keys.binary;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int num_steps = keys.padded_row_size / 16;
  auto* const products = reinterpret_cast<float*>(memory + at.products);
  const auto operand = [&](int from, int step) {
    return reinterpret_cast<const std::uint16_t*>(memory + from) + lane % 16 * at.operand_stride +
           step * 16 + lane / 16 * 8;
  };
  for (int byte = warp; byte < binary.num_bytes; byte += kBinarySearch.num_threads / 32) {
    const Index place = Index{head} * binary.num_bytes + byte;
    const auto* const directions =
        reinterpret_cast<const uint4*>(binary.directions) + place * num_steps * 64 + lane;
    float sums[2][4] = {};
#pragma unroll 4
    for (int step = 0; step < num_steps; ++step) {
      std::uint32_t hi[4], lo[4];
      load_matrices(hi, operand(at.hi, step));
      load_matrices(lo, operand(at.lo, step));
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const uint4 b = __ldg(directions + step * 64 + tile * 32);
        multiply_add(sums[tile], hi, b.x, b.y);
        multiply_add(sums[tile], hi, b.z, b.w);
        multiply_add(sums[tile], lo, b.x, b.y);
      }
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int column = tile * 8 + lane % 4 * 2;
      const float2 offset =
          __ldg(reinterpret_cast<const float2*>(binary.offsets + place * kBinaryColumns + column));
#pragma unroll
      for (int part = 0; part < 2; ++part)
        *reinterpret_cast<float2*>(products + (part * 8 + lane / 4) * at.product_stride +
                                   byte * kBinaryColumns + column) =
            float2{sums[tile][2 * part] * binary.key_factor + offset.x,
                   sums[tile][2 * part + 1] * binary.key_factor + offset.y};
    }
  }
}

/// The terms of the candidates' next byte.
template <int kWords>
__device__ __forceinline__ void begin_byte(const BinarySearchView& binary, int head, int byte,
                                           const float* products, int product_stride,
                                           BinaryCandidate<kWords> (&candidates)[2]) {
  using namespace append_instructions;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int steps_of_head = binary_steps_before(binary.num_bytes);
  const auto* grams = reinterpret_cast<const uint4*>(binary.grams) +
                      (Index{head} * steps_of_head + binary_steps_before(byte)) * 64 + lane;
  float sums[2][4] = {};
#pragma unroll
  for (int word = 0; word < kWords; ++word) {
    std::uint32_t first = candidates[0].history[word], second = candidates[1].history[word];
    const int num_steps = min(binary_steps_of(byte) - 8 * word, 8);
#pragma unroll 2
    for (int step = 0; step < num_steps; ++step, grams += 64) {
      const std::uint32_t bits[4] = {bits_as_halves(first), bits_as_halves(second),
                                     bits_as_halves(first >> 2), bits_as_halves(second >> 2)};
      first >>= 4;
      second >>= 4;
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const uint4 b = __ldg(grams + tile * 32);
        multiply_add(sums[tile], bits, b.x, b.y);
        multiply_add(sums[tile], bits, b.z, b.w);
      }
    }
  }
#pragma unroll
  for (int token = 0; token < 2; ++token) {
    const float* const of_key =
        products + token * product_stride + byte * kBinaryColumns + lane % 4 * 2;
    const float2 of_bits = *reinterpret_cast<const float2*>(of_key);
    candidates[token].of_a = of_bits.x + binary.gram_factor * sums[0][2 * token];
    candidates[token].of_b = of_bits.y + binary.gram_factor * sums[0][2 * token + 1];
    candidates[token].of_base = of_key[8] + binary.gram_factor * sums[1][2 * token];
  }
}

/// An extension that was chosen: its error, as the bits of a float, and the lane that it was.
struct BinaryChoice {
  std::uint32_t error;
  int lane;
};

/// Of the lanes' errors the best eight, sorted, ties to the lower lane; in `choices`, shared by the
/// warp alone. An error that is taken is no longer compared.
__device__ __forceinline__ void choose_one_by_one(std::uint32_t error, BinaryChoice* choices) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int rank = 0; rank < kMaxBinaryBeam; ++rank) {
    const std::uint32_t least = __reduce_min_sync(0xffffffffu, error);
    const unsigned lanes = __ballot_sync(0xffffffffu, error == least);
    if (lane != __ffs(static_cast<int>(lanes)) - 1) continue;
    choices[rank] = BinaryChoice{error, lane};
    error = ~0u;
  }
}

/// The same for both tokens of a warp, faster where no two of the least errors are equal.
__device__ __forceinline__ void choose_binary(const std::uint32_t (&errors)[2],
                                              BinaryChoice* choices) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::uint32_t left[2] = {errors[0], errors[1]};
  int ranks[2] = {kMaxBinaryBeam, kMaxBinaryBeam};
#pragma unroll
  for (int rank = 0; rank < kMaxBinaryBeam; ++rank)
#pragma unroll
    for (int token = 0; token < 2; ++token)
      if (left[token] == __reduce_min_sync(0xffffffffu, left[token])) {
        ranks[token] = rank;
        left[token] = ~0u;
      }
#pragma unroll
  for (int token = 0; token < 2; ++token) {
    BinaryChoice* const of_token = choices + token * kMaxBinaryBeam;
    const bool chosen = ranks[token] < kMaxBinaryBeam;
    if (__popc(__ballot_sync(0xffffffffu, chosen)) != kMaxBinaryBeam)
      choose_one_by_one(errors[token], of_token);
    else if (chosen)
      of_token[ranks[token]] = BinaryChoice{errors[token], lane};
  }
}

/// Replaces both tokens' `width` candidates by the best of their extensions, sorted, ties to the
/// smaller (candidate, a, b). Those past the new width mean nothing. `choices` are the warp's.
template <int kWords>
__device__ __forceinline__ void extend_binary(const BinaryStep* steps, int byte, int stage,
                                              int width, BinaryChoice* choices,
                                              BinaryCandidate<kWords> (&candidates)[2]) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const BinaryStep step = steps[stage * 4 + lane % 4];
  std::uint32_t errors[2];
#pragma unroll
  for (int token = 0; token < 2; ++token) {
    const BinaryCandidate<kWords>& own = candidates[token];
    const int from = (lane & ~3) | stage;
    float error = own.error + __shfl_sync(kAll, own.of_base, from);
    const float of_a = __shfl_sync(kAll, own.of_a, from);
    const float of_b = __shfl_sync(kAll, own.of_b, from);
    if ((lane & 2) != 0) error += of_a;
    if ((lane & 1) != 0) error += of_b;
    if ((lane & 3) == 3) error += step.both;
    // Less than nothing is nothing but rounding. Extensions that are not there come last, unequal.
    const int bits = max(static_cast<int>(__float_as_uint(error)), 0);
    errors[token] = lane / 4 < width ? static_cast<std::uint32_t>(bits) : 0xffffff00u + lane;
  }
  choose_binary(errors, choices);
  __syncwarp();
#pragma unroll
  for (int token = 0; token < 2; ++token) {
    BinaryCandidate<kWords>& own = candidates[token];
    const BinaryChoice choice = choices[token * kMaxBinaryBeam + lane / 4];
    const int from = (choice.lane & ~3) | (lane & 3);
    const bool a = (choice.lane & 2) != 0, b = (choice.lane & 1) != 0;
    own.error = __uint_as_float(choice.error);
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const bool holds = lane % 4 == stage && byte / 16 == word;
      const std::uint32_t bits = holds ? (a ? 1u : 0u) | (b ? 2u : 0u) : 0;
      own.history[word] = __shfl_sync(kAll, own.history[word], from) | bits << (byte % 16 * 2);
    }
    if (stage == 3) continue;  // no stage of the byte is left
    own.of_base = __shfl_sync(kAll, own.of_base, from);
    own.of_a = __shfl_sync(kAll, own.of_a, from);
    own.of_b = __shfl_sync(kAll, own.of_b, from);
    if (a) {
      own.of_base += step.a_to_base;
      own.of_a += step.a_to_a;
      own.of_b += step.a_to_b;
    }
    if (b) {
      own.of_base += step.b_to_base;
      own.of_a += step.b_to_a;
      own.of_b += step.b_to_b;
    }
  }
  __syncwarp();  // all have read the choices
}

/// Writes the best candidate's bits to its page, a word a lane.
template <int kWords>
__device__ __forceinline__ void write_binary_codes(const DevicePageLayout& layout, int head,
                                                   const BinaryCandidate<kWords>& candidate,
                                                   bool coded, const PagedCodes& pages,
                                                   Index place) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::uint32_t bits = 0;
#pragma unroll
  for (int word = 0; word < kWords; ++word)
#pragma unroll
    for (int stage = 0; stage < 4; ++stage) {
      const std::uint32_t history =
          __shfl_sync(0xffffffffu, candidate.history[word], stage) >> (lane % 4 * 8);
      if (lane / 4 != word) continue;
      bits |= ((history & 0x03) | (history & 0x0c) << 6 | (history & 0x30) << 12 |
               (history & 0xc0) << 18)
              << (2 * stage);
    }
  const KeyPlane& plane = layout.planes[0];
  if (place < 0 || lane > plane.num_words) return;
  write_key_word(layout, plane, head, PagePlace(layout, pages, place), lane, coded ? bits : 0);
}

/// The codes of 16 tokens of one head: grid (blocks of tokens, heads). kWords: of a history, one
/// for up to 16 bytes of codes.
template <int kWords>
__global__ void __launch_bounds__(kBinarySearch.num_threads, kBinarySearch.min_blocks)
    search_binary_codes(const __grid_constant__ EncoderView encoder, Index num_tokens,
                        const float* unit_keys, const std::uint16_t* norms, PagedCodes pages,
                        const std::int64_t* slot_mapping) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const KeyEncoderView& keys = encoder.keys;
  const DevicePageLayout& layout = encoder.layout;
  const BinarySearchShared at(keys);
  const int head = static_cast<int>(blockIdx.y);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  // The warp's tokens, in the block and in the call.
  const int first_row = 2 * warp;
  const Index first_token = Index{blockIdx.x} * kBinarySearch.num_tokens + first_row;
  auto* const errors = reinterpret_cast<float*>(shared + at.errors);

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool used = first_token + i < num_tokens;
    const float* const key =
        unit_keys + ((first_token + (used ? i : 0)) * layout.num_kv_heads + head) * layout.head_dim;
    const int offset = (first_row + i) * at.operand_stride;
    auto* const hi = reinterpret_cast<std::uint16_t*>(shared + at.hi) + offset;
    auto* const lo = reinterpret_cast<std::uint16_t*>(shared + at.lo) + offset;
    float sum = 0;
    for (int column = 2 * lane; column < keys.padded_row_size; column += 64) {
      const bool there = used && column < keys.row_size;
      const float x = there ? key[column] : 0.0f, y = there ? key[column + 1] : 0.0f;
      sum += x * x + y * y;
      const float scale = keys.binary.key_scale;
      const std::uint32_t rounded = pack_halves(scale * x, scale * y);
      *reinterpret_cast<std::uint32_t*>(hi + column) = rounded;
      *reinterpret_cast<std::uint32_t*>(lo + column) = pack_rests(scale * x, scale * y, rounded);
    }
    sum = warp_sum(sum);
    if (lane == 0) errors[first_row + i] = sum;
  }
  __syncthreads();
  multiply_binary_keys(keys, at, shared, head);
  __syncthreads();
  if (first_token >= num_tokens) return;

  BinaryCandidate<kWords> candidates[2] = {};
  for (int i = 0; i < 2; ++i) candidates[i].error = errors[first_row + i];
  const auto* const products =
      reinterpret_cast<const float*>(shared + at.products) + first_row * at.product_stride;
  auto* const choices =
      reinterpret_cast<BinaryChoice*>(shared + at.choices) + first_row * kMaxBinaryBeam;
  const BinaryStep* steps = keys.binary.steps + Index{head} * keys.num_stages * 4;
  int width = 1;
  for (int byte = 0; byte < keys.binary.num_bytes; ++byte, steps += 16) {
    begin_byte(keys.binary, head, byte, products, at.product_stride, candidates);
#pragma unroll
    for (int stage = 0; stage < 4; ++stage) {
      extend_binary(steps, byte, stage, width, choices, candidates);
      width = min(keys.beam_width, 4 * width);
    }
  }

  const int norm_index = layout.norms_per_token == 1 ? 0 : head;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Index token = first_token + i;
    if (token >= num_tokens) break;
    const bool coded = norms[token * layout.norms_per_token + norm_index] != kNanBf16;
    write_binary_codes(layout, head, candidates[i], coded, pages, slot_mapping[token]);
  }
}

}  // namespace commvq::cuda
