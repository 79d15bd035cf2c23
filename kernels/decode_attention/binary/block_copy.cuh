#pragma once

#include "common/memory.cuh"
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

/// Copies blocks to shared memory, some vectors a lane.
template <class Shape>
class BlockCopy {
  static constexpr int kVectors = Half<Shape>::kVectors;

 public:
  /// Reads where the halves of a block lie. Beyond the last token there may be no page: the first
  /// half stands for the second, whose weights will be zero.
  __device__ __forceinline__ void find(const Problem& p, const Segment& segment, int block) {
    const int token = segment.first_token + block * kBlockTokens;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = token + 16 * half <= segment.last_token ? token + 16 * half : token;
      pages_[half] = segment.table[at >> p.page.shift];
      slots_[half] = at & (p.page.size - 1);
    }
  }
  /// Starts copying the block that was found last.
  __device__ __forceinline__ void start(const Problem& p, const VectorPlace (&places)[kVectors],
                                        Half<Shape>* stage) const {
    const std::uint8_t* const pages[2] = {p.pages + pages_[0] * p.page_stride,
                                          p.pages + pages_[1] * p.page_stride};
#pragma unroll
    for (int vector = threadIdx.x % 32; vector < 2 * kVectors; vector += 32) {
      const bool second = vector >= kVectors;
      const VectorPlace place = places[second ? vector - kVectors : vector];
      copy_async_16(shared_address(reinterpret_cast<uint4*>(stage) + vector),
                    (second ? pages[1] : pages[0]) + place.base +
                        (second ? slots_[1] : slots_[0]) * place.per_slot);
    }
    commit_copies();
  }

 private:
  int pages_[2], slots_[2];
};

/// The key codes of a lane's four tokens.
template <class Shape>
struct LaneCodes {
  std::uint32_t words[4][Shape::kLaneWords];

  __device__ __forceinline__ explicit LaneCodes(const Half<Shape>* stage) {
    const int q = threadIdx.x % 4, slot = lane_token() % 16;
    const Half<Shape>& half = stage[lane_token() / 16];
#pragma unroll
    for (int w = 0; w < Shape::kLaneWords; ++w) {
      // The last lane's last word is the tail: three words hold those of four tokens.
      const bool is_tail = q == 3 && w + 1 == Shape::kLaneWords;
      const std::uint32_t* const source =
          is_tail ? half.tails + slot / 4 * 3 : &half.words[slot][4 * w + q];
      const int stride = is_tail ? 1 : Half<Shape>::kWords;
#pragma unroll
      for (int t = 0; t < 4; ++t) words[t][w] = source[is_tail && t == 3 ? 2 : t * stride];
    }
    if (q == 3) spread_tails();
  }

 private:
  __device__ __forceinline__ void spread_tails() {
    constexpr int w = Shape::kLaneWords - 1;
    constexpr std::uint32_t kOne = 1u << 24;  // the code bit of what all keys have in common
    const std::uint32_t a = words[0][w], b = words[1][w], c = words[2][w];
    words[0][w] = (a & 0xffffffu) | kOne;
    words[1][w] = (__funnelshift_r(a, b, 24) & 0xffffffu) | kOne;
    words[2][w] = (__funnelshift_r(b, c, 16) & 0xffffffu) | kOne;
    words[3][w] = c >> 8 | kOne;
  }
};

/// Four bf16 numbers as floats.
__device__ __forceinline__ void widen(const std::uint16_t* four, float (&numbers)[4]) {
  const uint2 words = *reinterpret_cast<const uint2*>(four);
  numbers[0] = __uint_as_float(words.x << 16);
  numbers[1] = __uint_as_float(words.x & 0xffff0000u);
  numbers[2] = __uint_as_float(words.y << 16);
  numbers[3] = __uint_as_float(words.y & 0xffff0000u);
}

}  // namespace commvq::cuda::binary_attention
