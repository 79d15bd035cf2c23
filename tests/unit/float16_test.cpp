#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "commvq/core/float16.hpp"

#include <gtest/gtest.h>

namespace commvq {
namespace {

/// Neighbours of the result in its own format must not be nearer to `value`; of two that are as
/// near, the even one is right.
template <class To, class From>
void expect_nearest(float value, To to, From from) {
  const std::uint16_t bits = to(value);
  const double distance = std::abs(double(from(bits)) - value);
  for (const int step : {-1, 1}) {
    const auto neighbour = static_cast<std::uint16_t>(bits + step);
    const float other = from(neighbour);
    if (!std::isfinite(other) || std::signbit(other) != std::signbit(value)) continue;
    const double other_distance = std::abs(double(other) - value);
    EXPECT_LE(distance, other_distance) << value;
    if (distance == other_distance) {
      EXPECT_EQ(bits & 1, 0) << value;
    }
  }
}

TEST(Float16, EveryFiniteHalfSurvives) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    if (std::isnan(from_fp16(half))) {
      EXPECT_TRUE(std::isnan(from_fp16(to_fp16(from_fp16(half)))));
    } else {
      EXPECT_EQ(to_fp16(from_fp16(half)), half);
    }
    if (std::isnan(from_bf16(half))) {
      EXPECT_TRUE(std::isnan(from_bf16(to_bf16(from_bf16(half)))));
    } else {
      EXPECT_EQ(to_bf16(from_bf16(half)), half);
    }
  }
}

TEST(Float16, KnownValues) {
  EXPECT_EQ(from_fp16(0x3c00), 1.0f);
  EXPECT_EQ(from_fp16(0x7bff), 65504.0f);
  EXPECT_EQ(from_fp16(0x0001), std::ldexp(1.0f, -24));
  EXPECT_EQ(from_fp16(0xc000), -2.0f);
  EXPECT_EQ(from_bf16(0x3f80), 1.0f);
  EXPECT_EQ(from_bf16(0xc040), -3.0f);
}

TEST(Float16, RoundsToNearestEven) {
  std::mt19937_64 rng(1);
  for (int i = 0; i < 200'000; ++i) {
    const auto bits = static_cast<std::uint32_t>(rng());
    float value;
    std::memcpy(&value, &bits, 4);
    if (!std::isfinite(value)) continue;
    if (std::abs(value) < 3.38e38f) expect_nearest(value, to_bf16, from_bf16);
    const float small = std::ldexp(value, -std::ilogb(value) - static_cast<int>(rng() % 40) + 15);
    if (std::abs(small) < 65504) expect_nearest(small, to_fp16, from_fp16);
  }
}

TEST(Float16, OverflowBecomesInfinity) {
  EXPECT_EQ(from_fp16(to_fp16(65519.0f)), 65504.0f);
  EXPECT_EQ(from_fp16(to_fp16(65520.0f)), std::numeric_limits<float>::infinity());
  EXPECT_EQ(from_fp16(to_fp16(-1e30f)), -std::numeric_limits<float>::infinity());
  EXPECT_EQ(from_bf16(to_bf16(std::numeric_limits<float>::max())),
            std::numeric_limits<float>::infinity());
}

}  // namespace
}  // namespace commvq
