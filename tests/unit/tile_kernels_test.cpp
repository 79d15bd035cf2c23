#include "attention/tile_kernels.hpp"

#include <cmath>
#include <numeric>

#include "commvq/core/bit_packing.hpp"

#include <gtest/gtest.h>

#include "reference/random_cache.hpp"

namespace commvq::attention {
namespace {

using testing_support::normal_floats;
using testing_support::random_key_codec;
using testing_support::Rng;

TEST(UnpackCodes, EqualsGetBitsForEveryWidth) {
  Rng rng(1);
  for (int width = 1; width <= kMaxCodeBits; ++width)
    for (const Index count : {0, 1, 3, 8, 57, 200}) {
      std::vector<std::uint8_t> stream(static_cast<std::size_t>(bytes_for(count * width) + 8));
      for (auto& byte : stream) byte = static_cast<std::uint8_t>(rng());
      std::vector<std::uint16_t> codes(static_cast<std::size_t>(count) + 1, 0xabcd);
      unpack_codes(stream.data(), width, count, codes.data());
      for (Index i = 0; i < count; ++i)
        ASSERT_EQ(codes[static_cast<std::size_t>(i)], get_bits(stream.data(), i * width, width))
            << "width " << width << ", code " << i;
      EXPECT_EQ(codes.back(), 0xabcd);
    }
}

// 9 stages are not a multiple of those read at a time, and 80 or 40 pairs a group leave padding.
TEST(SumRows, EqualsTheDecodedKey) {
  Rng rng(2);
  for (const auto& [num_groups, tied] :
       {std::pair(1, true), std::pair(2, true), std::pair(1, false), std::pair(2, false)}) {
    KeyCodecConfig config;
    config.pairs.head_dim = config.pairs.rotary_dim = 160;
    config.group_pairs = 80 / num_groups;
    config.tied = tied;
    config.codebook_size = 16;
    config.num_stages = 9;
    const auto codec = random_key_codec(rng, config, 2);
    const KeyTables tables(codec);
    constexpr int kTokens = 37, kPaddedPairs = 80;
    std::vector<std::uint16_t> codes(static_cast<std::size_t>(kTokens * config.num_codes()));
    for (auto& code : codes) code = static_cast<std::uint16_t>(rng() % 16);
    std::vector<std::int16_t> sums(kTokens * 2 * kPaddedPairs);
    RowScratch scratch;
    sum_rows(tables, 1, codes.data(), kTokens, kPaddedPairs, sums.data(), scratch);
    std::vector<float> decoded(160);
    for (int t = 0; t < kTokens; ++t) {
      decode_key(codec->codebook(1), &codes[static_cast<std::size_t>(t * config.num_codes())],
                 decoded.data());
      for (int pair = 0; pair < 80; ++pair)
        for (int part = 0; part < 2; ++part) {
          const float unit = tables.units(1)[pair];
          const std::int16_t sum = sums[static_cast<std::size_t>((2 * t + part) * 80 + pair)];
          // Each of the 18 rows was rounded to half a unit.
          ASSERT_NEAR(sum * unit, decoded[static_cast<std::size_t>(part * 80 + pair)], 9.1f * unit);
        }
    }
  }
}

TEST(AddCodeBits, AddsWeightsOfSetBitsToTheStatedError) {
  Rng rng(3);
  constexpr Index kBits = 96, kStride = 100;
  for (const int rows : {1, 4, 6})
    for (const int num_bytes : {1, 5, 8}) {
      std::vector<std::uint8_t> bytes(static_cast<std::size_t>(num_bytes * kBits));
      for (auto& byte : bytes) byte = static_cast<std::uint8_t>(rng());
      std::vector<float> weights(static_cast<std::size_t>(rows * kTile));
      for (int r = 0; r < rows; ++r)
        for (int t = 0; t < 8 * num_bytes; ++t)
          weights[static_cast<std::size_t>(r * kTile + t)] =
              std::exp(-static_cast<float>(rng() % 2000) / 100) * (r == 1 ? 1e-30f : 1e3f);
      std::vector<float> sums = normal_floats(rng, rows * kStride);
      const std::vector<float> before = sums;
      add_code_bits(bytes.data(), kBits, num_bytes, kBits, weights.data(), rows, sums.data(),
                    kStride);
      for (int r = 0; r < rows; ++r) {
        const float* const w = &weights[static_cast<std::size_t>(r * kTile)];
        const double total = std::accumulate(w, w + kTile, 0.0);
        for (Index i = 0; i < kStride; ++i) {
          const auto at = static_cast<std::size_t>(r * kStride + i);
          double expected = before[at];
          for (int t = 0; t < 8 * num_bytes && i < kBits; ++t)
            if (bytes[static_cast<std::size_t>(t / 8 * kBits + i)] >> (t % 8) & 1) expected += w[t];
          ASSERT_NEAR(sums[at], expected, total / 2048 + 1e-6 * std::abs(expected));
        }
      }
    }
}

TEST(AddCodeBits, WeightsOfZeroAddNothing) {
  const std::vector<std::uint8_t> bytes(32, 0xff);
  const std::vector<float> weights(kTile, 0.0f);
  std::vector<float> sums(32, 3.0f);
  add_code_bits(bytes.data(), 32, 1, 32, weights.data(), 1, sums.data(), 32);
  EXPECT_EQ(sums, std::vector<float>(32, 3.0f));
}

}  // namespace
}  // namespace commvq::attention
