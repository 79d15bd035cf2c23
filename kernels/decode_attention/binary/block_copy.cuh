#pragma once

#include "common/memory.cuh"
#include "common/wgmma.cuh"
#include "decode_attention/binary/shape.cuh"

namespace commvq::cuda::binary_attention {

/// Fills `places`: where the vectors of a half block come from.
template <class Shape>
__device__ __forceinline__ void find_places(const Problem& p, const KeyCodes& codes, int head,
                                            VectorPlace (&places)[Half<Shape>::kVectors]) {
  using OneHalf = Half<Shape>;
  static_assert(sizeof(OneHalf) == 16 * OneHalf::kVectors);
  const int vector = static_cast<int>(threadIdx.x);
  if (vector >= OneHalf::kVectors) return;
  VectorPlace place{};
  const auto set = [&](int part_begin, int base, int per_slot) {
    if (vector * 16 >= part_begin) place = {base + vector * 16 - part_begin, per_slot};
  };
  const int first = head * p.page.size;
  set(offsetof(OneHalf, words), codes.words + first * OneHalf::kWords * 4, OneHalf::kWords * 4);
  set(offsetof(OneHalf, tails), codes.tails + first * 3, 3);
  set(offsetof(OneHalf, norms), p.page.key_norms + head * p.page.norm_stride, 2);
  set(offsetof(OneHalf, scales), p.page.value_scales + head * p.page.scale_stride, 2);
  set(offsetof(OneHalf, values), p.page.value_codes + head * Shape::kValueBits * 2,
      p.page.num_code_bits / 8);
  places[vector] = place;
}

/// Where sixteen tokens of a round lie. Beyond the last token there may be no page: the last
/// sixteen stand for what follows, whose weights will be zero.
__device__ __forceinline__ Source source_of(const Problem& p, const Segment& segment, int tile,
                                            int round, int sixteen) {
  const int token =
      min(segment.first_token + segment.round_begin(tile, round) * kBlockTokens + 16 * sixteen,
          segment.last_half);
  return {p.pages + segment.table[token >> p.page.shift] * p.page_stride,
          token & (p.page.size - 1)};
}

/// Copies a warp's blocks to shared memory: the lower lanes the first half, the upper ones the
/// second.
template <class Shape>
class BlockCopy {
  static constexpr int kVectors = Half<Shape>::kVectors;
  static constexpr int kLanes = 16;
  static constexpr int kTimes = (kVectors + kLanes - 1) / kLanes;
  /// Where vectors come from is kept in registers if these are not scarce.
  static constexpr bool kKeepsPlaces = COMMVQ_WGMMA && Shape::kHighEights == 3;

 public:
  explicit __device__ __forceinline__ BlockCopy(const VectorPlace (&places)[kVectors]) {
    if constexpr (kKeepsPlaces)
#pragma unroll
      for (int i = 0; i < kTimes; ++i) places_[i] = place_of(places, i);
  }
  /// Which half of a block this lane copies.
  static __device__ __forceinline__ int half() {
    return threadIdx.x % 32 / kLanes;
  }
  /// Starts copying a block whose half lies at `source`.
  __device__ __forceinline__ void start(Source source, const VectorPlace (&places)[kVectors],
                                        Half<Shape>* stage) const {
    const int lane = threadIdx.x % kLanes;
    const std::uint32_t target = shared_address(stage + half()) + lane * 16;
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
      if (i * kLanes + kLanes > kVectors && i * kLanes + lane >= kVectors) break;
      const VectorPlace place = kKeepsPlaces ? places_[i] : place_of(places, i);
      copy_async_16(
          target + i * kLanes * 16,
          source.page + static_cast<std::uint32_t>(place.base + source.slot * place.per_slot));
    }
    commit_copies();
  }

 private:
  static __device__ __forceinline__ VectorPlace place_of(const VectorPlace (&places)[kVectors],
                                                         int i) {
    return places[min(i * kLanes + static_cast<int>(threadIdx.x) % kLanes, kVectors - 1)];
  }

  VectorPlace places_[kKeepsPlaces ? kTimes : 1];
};

/// Where a lane finds the key codes of its four tokens in a stage: bytes to the first one's and
/// from one to the next.
struct CodePlace {
  int first;
  int stride;

  template <class Shape>
  static __device__ __forceinline__ CodePlace of_lane() {
    using OneHalf = Half<Shape>;
    const int lane = threadIdx.x % 32, q = lane % 4;
    const int half = lane_token(lane) / 16, slot = lane_token(lane) % 16;
    // The last lane's last word is the tail: three words hold those of four tokens.
    const bool is_tail = q == 3;
    const int in_half = is_tail ? static_cast<int>(offsetof(OneHalf, tails)) + slot / 4 * 12
                                : (slot * OneHalf::kWords + q) * 4;
    return {half * static_cast<int>(sizeof(OneHalf)) + in_half, is_tail ? 4 : OneHalf::kWords * 4};
  }
};

/// The key codes of a lane's four tokens.
template <class Shape>
struct LaneCodes {
  std::uint32_t words[4][Shape::kLaneWords];

  __device__ __forceinline__ LaneCodes(const Half<Shape>* stage, CodePlace place, int lane) {
    constexpr int kLast = Shape::kLaneWords - 1;
    const bool is_tail = lane % 4 == 3;
    const auto* const bytes = reinterpret_cast<const std::uint8_t*>(stage);
    const auto word = [&](int offset) {
      return *reinterpret_cast<const std::uint32_t*>(bytes + offset);
    };
    if constexpr (kLast > 0) {
      const Half<Shape>& half = stage[lane_token(lane) / 16];
#pragma unroll
      for (int t = 0; t < 4; ++t) words[t][0] = half.words[lane_token(lane) % 16 + t][lane % 4];
    }
    const int first = place.first + (is_tail ? 0 : kLast * 16);
#pragma unroll
    for (int t = 0; t < 3; ++t) words[t][kLast] = word(first + t * place.stride);
    words[3][kLast] = word(first + (is_tail ? 2 : 3) * place.stride);
    // Tails are 24 bits: they are shifted to their places, other words by none; and the bit after
    // them is the code of what all keys have in common.
    const std::uint32_t tail_bits = is_tail ? 0xffffffu : ~0u, one = is_tail ? 1u << 24 : 0u;
    const int shift = is_tail ? 24 : 48;
    words[3][kLast] = __funnelshift_rc(words[2][kLast], words[3][kLast], shift - 16);
    words[2][kLast] = __funnelshift_rc(words[1][kLast], words[2][kLast], shift - 8);
    words[1][kLast] = __funnelshift_rc(words[0][kLast], words[1][kLast], shift);
#pragma unroll
    for (int t = 0; t < 4; ++t) words[t][kLast] = (words[t][kLast] & tail_bits) | one;
    // The bit that comes first counts most.
    if constexpr (Shape::kGraded)
#pragma unroll
      for (auto& token_words : words)
#pragma unroll
        for (std::uint32_t& token_word : token_words) token_word = __brev(token_word);
  }
};

/// Four bf16 numbers as floats.
__device__ __forceinline__ void widen(const std::uint16_t* four, float (&numbers)[4]) {
  const uint2 words = *reinterpret_cast<const uint2*>(four);
  const float2 first = bf16_to_floats(words.x), last = bf16_to_floats(words.y);
  numbers[0] = first.x, numbers[1] = first.y, numbers[2] = last.x, numbers[3] = last.y;
}

}  // namespace commvq::cuda::binary_attention
