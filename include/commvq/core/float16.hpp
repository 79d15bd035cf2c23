#pragma once

#include <bit>
#include <cstdint>
#include <string>

#include "commvq/core/view.hpp"

namespace commvq {

/// Number formats in which exact keys and values may be stored.
enum class FloatType { kBf16, kFp16, kFp32 };

inline const char* name_of(FloatType type) {
  switch (type) {
    case FloatType::kBf16: return "bf16";
    case FloatType::kFp16: return "fp16";
    case FloatType::kFp32: return "fp32";
  }
  return "unknown";
}

/// Bytes of one number.
inline Index size_of(FloatType type) { return type == FloatType::kFp32 ? 4 : 2; }

/// Rounds to the nearest bfloat16, ties to even; NaN stays NaN, overflow becomes infinity.
inline std::uint16_t to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_bf16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

/// Rounds to the nearest IEEE binary16, ties to even; NaN stays NaN, overflow becomes infinity.
inline std::uint16_t to_fp16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Subnormal result: let the float adder round at the right bit (0.5 has ulp 2^-24).
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline float from_fp16(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t magnitude = bits & 0x7fffu;
  // Selected, not branched to, so that loops become vector code.
  const float subnormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f;
  const std::uint32_t bias = magnitude < 0x7c00u ? 0x38000000u : 0x70000000u;
  const std::uint32_t value =
      magnitude < 0x400u ? std::bit_cast<std::uint32_t>(subnormal) : (magnitude << 13) + bias;
  return std::bit_cast<float>(sign | value);
}

}  // namespace commvq
