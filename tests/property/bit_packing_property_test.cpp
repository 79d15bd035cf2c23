#include <random>
#include <vector>

#include "commvq/core/bit_packing.hpp"

#include <gtest/gtest.h>

namespace commvq {
namespace {

class BitPacking : public testing::TestWithParam<int> {};

TEST_P(BitPacking, StreamOfCodesRoundTripsAtEveryOffset) {
  const int width = GetParam();
  std::mt19937_64 rng(static_cast<std::uint64_t>(width));
  for (Index offset = 0; offset < 16; ++offset) {
    const Index count = 1 + static_cast<Index>(rng() % 100);
    std::vector<std::uint8_t> stream(static_cast<std::size_t>(bytes_for(offset + count * width)));
    std::vector<std::uint32_t> codes;
    for (Index i = 0; i < count; ++i) {
      codes.push_back(static_cast<std::uint32_t>(rng() & ((1u << width) - 1)));
      put_bits(stream.data(), offset + i * width, width, codes.back());
    }
    for (Index i = 0; i < count; ++i)
      ASSERT_EQ(get_bits(stream.data(), offset + i * width, width),
                codes[static_cast<std::size_t>(i)]);
  }
}

TEST_P(BitPacking, WritingLeavesOtherBitsAlone) {
  const int width = GetParam();
  std::mt19937_64 rng(100 + static_cast<std::uint64_t>(width));
  for (int repeat = 0; repeat < 200; ++repeat) {
    std::vector<std::uint8_t> stream(8);
    for (auto& byte : stream) byte = static_cast<std::uint8_t>(rng());
    const std::vector<std::uint8_t> before = stream;
    const Index position = static_cast<Index>(rng() % static_cast<std::uint64_t>(65 - width));
    put_bits(stream.data(), position, width, static_cast<std::uint32_t>(rng()));
    for (Index bit = 0; bit < 64; ++bit)
      if (bit < position || bit >= position + width) {
        ASSERT_EQ(get_bits(stream.data(), bit, 1), get_bits(before.data(), bit, 1));
      }
  }
}

TEST_P(BitPacking, FieldIsLittleEndian) {
  const int width = GetParam();
  std::vector<std::uint8_t> stream(4);
  put_bits(stream.data(), 3, width, 1u << (width - 1));
  for (Index bit = 0; bit < 32; ++bit)
    EXPECT_EQ(stream[static_cast<std::size_t>(bit / 8)] >> (bit % 8) & 1, bit == 3 + width - 1);
}

INSTANTIATE_TEST_SUITE_P(Widths, BitPacking, testing::Range(1, kMaxCodeBits + 1));

TEST(BitsFor, IsTheBitsThatTellCodesApart) {
  EXPECT_EQ(bits_for(1), 0);
  EXPECT_EQ(bits_for(2), 1);
  EXPECT_EQ(bits_for(3), 2);
  EXPECT_EQ(bits_for(64), 6);
  EXPECT_EQ(bits_for(65), 7);
  EXPECT_EQ(bits_for(65536), 16);
}

}  // namespace
}  // namespace commvq
