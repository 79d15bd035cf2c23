#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

/// Sixteen floats at a time, by the compilers' vector extensions: on a machine with narrower
/// registers each operation becomes several.
namespace commvq::simd {

inline constexpr int kLanes = 16;

using Vec = float __attribute__((vector_size(64)));
using IntVec = std::int32_t __attribute__((vector_size(64)));
using ShortVec = std::int16_t __attribute__((vector_size(64)));
using UnsignedShortVec = std::uint16_t __attribute__((vector_size(64)));

// As they may lie in memory: aligned like their elements, aliasing arrays of them. (Of an alias
// declaration Clang takes a lower alignment only where it stands before the type.)
using LooseVec __attribute__((aligned(4), may_alias)) = Vec;
using LooseShorts __attribute__((aligned(2), may_alias)) = ShortVec;
using LooseHalfShorts __attribute__((aligned(2), may_alias)) =
    std::int16_t __attribute__((vector_size(32)));
using LooseBytes __attribute__((aligned(1), may_alias)) =
    std::uint8_t __attribute__((vector_size(32)));
static_assert(alignof(LooseVec) == 4 && alignof(LooseShorts) == 2 &&
              alignof(LooseHalfShorts) == 2 && alignof(LooseBytes) == 1);

/// Memory on cache lines: a vector that lies across two costs two accesses.
template <class T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(std::size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), kLine));
  }
  void deallocate(T* p, std::size_t) { ::operator delete(p, kLine); }
  bool operator==(const LineAllocator&) const { return true; }
};
template <class T>
using LineVector = std::vector<T, LineAllocator<T>>;

inline Vec load(const float* p) {
  return *reinterpret_cast<const LooseVec*>(p);
}
inline void store(float* p, Vec v) {
  *reinterpret_cast<LooseVec*>(p) = v;
}
inline Vec broadcast(float x) {
  return Vec{} + x;
}

inline ShortVec load_shorts(const std::int16_t* p) {
  return *reinterpret_cast<const LooseShorts*>(p);
}
inline void store_shorts(std::int16_t* p, ShortVec v) {
  *reinterpret_cast<LooseShorts*>(p) = v;
}

// Widening conversions and lookups have code of their own where compilers make too much of the
// portable form: several instructions for one, and sums spilled to memory.

/// Sixteen 16-bit integers as floats.
inline Vec load_as_floats(const std::int16_t* p) {
#if defined(__AVX512BW__)
  const auto* const lanes = reinterpret_cast<const __m256i*>(p);
  return reinterpret_cast<Vec>(
      _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(lanes))));
#else
  return __builtin_convertvector(*reinterpret_cast<const LooseHalfShorts*>(p), Vec);
#endif
}
/// Thirty-two bytes as 16-bit integers.
inline UnsignedShortVec load_as_shorts(const std::uint8_t* p) {
#if defined(__AVX512BW__)
  const auto* const lanes = reinterpret_cast<const __m256i*>(p);
  return reinterpret_cast<UnsignedShortVec>(_mm512_cvtepu8_epi16(_mm256_loadu_si256(lanes)));
#else
  return __builtin_convertvector(*reinterpret_cast<const LooseBytes*>(p), UnsignedShortVec);
#endif
}
/// Half 0 or 1 of thirty-two 16-bit integers, as floats.
template <int half>
Vec half_as_floats(UnsignedShortVec v) {
#if defined(__AVX512BW__)
  const __m256i lanes = _mm512_extracti64x4_epi64(reinterpret_cast<__m512i>(v), half);
  return reinterpret_cast<Vec>(_mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(lanes)));
#else
  using Half = std::uint16_t __attribute__((vector_size(32)));
  Half lanes;
  std::memcpy(&lanes, reinterpret_cast<const char*>(&v) + half * sizeof lanes, sizeof lanes);
  return __builtin_convertvector(__builtin_convertvector(lanes, IntVec), Vec);
#endif
}

/// Stores sixteen floats, truncated, as 16-bit integers.
inline void store_as_shorts(std::uint16_t* p, Vec v) {
  using Half = std::uint16_t __attribute__((vector_size(32)));
  const Half lanes = __builtin_convertvector(__builtin_convertvector(v, IntVec), Half);
  std::memcpy(p, &lanes, sizeof lanes);
}

/// Lane i of the result is lane (indices[i] % 32) of `table`.
inline UnsignedShortVec lookup(UnsignedShortVec table, UnsignedShortVec indices) {
#if defined(__AVX512BW__)
  return reinterpret_cast<UnsignedShortVec>(_mm512_permutexvar_epi16(
      reinterpret_cast<__m512i>(indices), reinterpret_cast<__m512i>(table)));
#elif defined(__GNUC__) && !defined(__clang__)
  return __builtin_shuffle(table, indices);
#else
  UnsignedShortVec result;
  for (int i = 0; i < 2 * kLanes; ++i) result[i] = table[indices[i] & 31];
  return result;
#endif
}

/// e^x for x <= 0, to about two units in the last place; 0 below -87.
inline Vec exp_nonpositive(Vec x) {
  const Vec magic = broadcast(0x1.8p23f);  // adding it rounds to an integer
  const Vec shifted = x * 1.44269504f + magic;
  const Vec rounded = shifted - magic;
  const Vec rest = (x - rounded * 0.693145752f) - rounded * 1.42860677e-6f;
  Vec sum = rest * (1.0f / 720) + 1.0f / 120;
  sum = sum * rest + 1.0f / 24;
  sum = sum * rest + 1.0f / 6;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  const IntVec exponent = reinterpret_cast<IntVec>(shifted) << 23;
  const Vec result = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(sum) + exponent);
  return x < -87.0f ? Vec{} : result;
}

inline float sum_of_lanes(Vec v) {
  float result = 0;
  for (int i = 0; i < kLanes; ++i) result += v[i];
  return result;
}

/// One step of a transposed sum: halves of `2 * width` lanes of x and y are added up and laid side
/// by side.
template <int width, std::size_t... lane>
Vec fold_pair(Vec x, Vec y, std::index_sequence<lane...>) {
  constexpr auto source = [](int i) {
    return i / (2 * width) * (2 * width) + i % width + (i % (2 * width) < width ? 0 : kLanes);
  };
  return __builtin_shufflevector(x, y, source(lane)...) +
         __builtin_shufflevector(x, y, (source(lane) + width)...);
}

template <int width>
void fold(Vec* v) {
  for (int i = 0; i < width; ++i)
    v[i] = fold_pair<width>(v[i], v[i + width], std::make_index_sequence<kLanes>());
}

/// Lane i of the result is the sum over the lanes of v[i]. Overwrites `v`, `[16]`.
inline Vec sum_each(Vec* v) {
  fold<8>(v);
  fold<4>(v);
  fold<2>(v);
  fold<1>(v);
  return v[0];
}

}  // namespace commvq::simd
