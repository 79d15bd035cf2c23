// The order of codes in a device page, and codebooks in integers. Needs no device.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "commvq/core/error.hpp"
#include "commvq/cuda/integer_codebook.hpp"
#include "commvq/cuda/page_layout.hpp"
#include "commvq/value_codec/value_codec.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "reference/random_cache.hpp"

namespace commvq::cuda {
namespace {

using testing_support::Rng;

struct Shape {
  int head_dim, group_pairs, codebook_size, num_stages, num_kv_heads, value_bits, page_size;
  Index plane_bytes;
  bool norm_per_head = false;
};

void PrintTo(const Shape& s, std::ostream* out) {
  *out << "D" << s.head_dim << " g" << s.group_pairs << " Nc" << s.codebook_size << " R"
       << s.num_stages << " heads" << s.num_kv_heads << " bits" << s.value_bits << " page"
       << s.page_size << " plane" << s.plane_bytes;
}

KeyCodecConfig key_config(const Shape& shape) {
  KeyCodecConfig config;
  config.pairs = {shape.head_dim, shape.head_dim, RopeLayout::kHalfSplit};
  config.group_pairs = shape.group_pairs;
  config.codebook_size = shape.codebook_size;
  config.num_stages = shape.num_stages;
  config.tied = false;
  config.norm_per_head = shape.norm_per_head;
  return config;
}

DevicePageLayout layout_of(const Shape& shape) {
  ValueCodecConfig values;
  values.num_channels = shape.num_kv_heads * shape.head_dim;
  values.bits = shape.value_bits;
  return {key_config(shape), shape.num_kv_heads, values, shape.page_size, shape.plane_bytes};
}

class DeviceLayout : public testing::TestWithParam<Shape> {};

TEST_P(DeviceLayout, TokensReadBackAsWritten) {
  const DevicePageLayout layout = layout_of(GetParam());
  Rng rng(1);
  const auto num_codes =
      static_cast<std::size_t>(layout.num_kv_heads * layout.num_groups * layout.num_books);
  struct Token {
    std::vector<std::uint16_t> codes;
    std::vector<std::uint16_t> norms;
    std::uint16_t scale;
    std::vector<std::uint8_t> value;
  };
  std::vector<Token> tokens;
  std::vector<std::uint8_t> page(static_cast<std::size_t>(layout.page_bytes), 0xa5);
  for (int slot = 0; slot < layout.page_size; ++slot) {
    Token token;
    for (std::size_t i = 0; i < num_codes; ++i)
      token.codes.push_back(
          static_cast<std::uint16_t>(rng() % static_cast<unsigned>(layout.codebook_size)));
    for (int i = 0; i < layout.norms_per_token; ++i)
      token.norms.push_back(static_cast<std::uint16_t>(rng()));
    token.scale = static_cast<std::uint16_t>(rng());
    for (int i = 0; i < layout.num_code_bits / 8; ++i)
      token.value.push_back(static_cast<std::uint8_t>(rng()));
    tokens.push_back(token);
  }
  std::vector<int> order(tokens.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::shuffle(order.begin(), order.end(), rng);
  for (const int slot : order) {
    const Token& token = tokens[static_cast<std::size_t>(slot)];
    put_token(layout, page.data(), slot, token.codes.data(), token.norms.data(), token.value.data(),
              &token.scale);
  }
  for (int slot = 0; slot < layout.page_size; ++slot) {
    const Token& token = tokens[static_cast<std::size_t>(slot)];
    Token read = token;
    std::fill(read.codes.begin(), read.codes.end(), std::uint16_t{0xffff});
    std::fill(read.value.begin(), read.value.end(), std::uint8_t{0});
    get_token(layout, page.data(), slot, read.codes.data(), read.norms.data(), read.value.data(),
              &read.scale);
    EXPECT_EQ(read.codes, token.codes) << slot;
    EXPECT_EQ(read.norms, token.norms) << slot;
    EXPECT_EQ(read.value, token.value) << slot;
    EXPECT_EQ(read.scale, token.scale) << slot;
  }
}

TEST_P(DeviceLayout, APageHoldsItsBitsAndLittleMore) {
  const DevicePageLayout layout = layout_of(GetParam());
  const KeyCodecConfig config = key_config(GetParam());
  const Index bits = Index{config.bits_per_head()} * layout.num_kv_heads +
                     16 * config.num_norms(layout.num_kv_heads) + layout.num_code_bits + 16;
  const Index exact = bits * layout.page_size / 8;
  EXPECT_GE(layout.page_bytes, exact);
  EXPECT_LE(layout.page_bytes, exact + 15 * (2 * layout.num_planes + 3));
  Index plane_bits = 0;
  for (int i = 0; i < layout.num_planes; ++i) {
    const KeyPlane& plane = layout.planes[i];
    EXPECT_EQ(plane.num_books * layout.code_bits, plane.num_words * 32 + plane.tail_bits);
    EXPECT_LE(IntegerKeySlice::image_bytes(slice_width(config), 8, false, plane.num_books,
                                           layout.codebook_size),
              GetParam().plane_bytes);
    plane_bits += plane.num_books * layout.code_bits;
  }
  EXPECT_EQ(plane_bits, config.bits_per_head());
}

TEST_P(DeviceLayout, SumsOfIntegersStayInAByteAndDecodeToTheCodebook) {
  const Shape& shape = GetParam();
  const DevicePageLayout layout = layout_of(shape);
  Rng rng(2);
  const auto codec = testing_support::random_key_codec(rng, key_config(shape), shape.num_kv_heads);
  const KeyCodebook<float>& codebook = codec->codebook(0);
  const int width = slice_width(codebook.config);
  const int row_bits = layout.key_row_bits;
  for (int i = 0; i < layout.num_planes; ++i) {
    const KeyPlane& plane = layout.planes[i];
    const int num_pairs = std::min(width, shape.group_pairs);
    const IntegerKeySlice slice(codebook, plane, plane.group * shape.group_pairs, num_pairs, width,
                                row_bits);
    for (int channel = 0; channel < 2 * width; ++channel) {
      int most = 0;
      for (int book = 0; book < slice.num_books; ++book) {
        int largest = 0;
        for (int c = 0; c < slice.codebook_size; ++c) {
          const int entry = slice.rows[static_cast<std::size_t>(
              (book * slice.codebook_size + c) * 2 * width + channel)];
          if (row_bits == 4) {
            EXPECT_GE(entry, 0);
            EXPECT_LE(entry, plane.place == 0 && book < 2 ? 30 : 15);
          }
          largest = std::max(largest, std::abs(entry));
        }
        most += largest;
      }
      EXPECT_LE(most, row_bits == 4 ? 255 : 127) << "plane " << i << " channel " << channel;
    }
  }
  const KeyCodec rounded = rounded_to_integers(*codec, layout);
  for (int head = 0; head < shape.num_kv_heads; ++head) {
    double error = 0, energy = 0;
    const auto& before = codec->codebook(head).rows;
    const auto& after = rounded.codebook(head).rows;
    // Books keep their rows up to a constant of the channel: sums of one row a book agree.
    std::vector<std::uint16_t> codes(static_cast<std::size_t>(codebook.config.num_codes()));
    std::vector<float> a(static_cast<std::size_t>(shape.head_dim)), b(a.size());
    for (int i = 0; i < 200; ++i) {
      for (auto& code : codes)
        code = static_cast<std::uint16_t>(rng() % static_cast<unsigned>(shape.codebook_size));
      decode_key(codec->codebook(head), codes.data(), a.data());
      decode_key(rounded.codebook(head), codes.data(), b.data());
      for (std::size_t d = 0; d < a.size(); ++d) {
        error += (a[d] - b[d]) * (a[d] - b[d]);
        energy += a[d] * a[d];
      }
    }
    // Row by row as well: an encoder meets the residuals that it was made for.
    ASSERT_EQ(before.size(), after.size());
    double row_error = 0, row_energy = 0;
    for (std::size_t d = 0; d < before.size(); ++d) {
      row_error += (before[d] - after[d]) * (before[d] - after[d]);
      row_energy += before[d] * before[d];
    }
    EXPECT_LT(row_error / row_energy, 0.05) << "head " << head;
    EXPECT_LT(error / energy, 0.04) << "head " << head;  // books shrink by 0.8 a stage
    EXPECT_GT(error / energy, 0.0);
  }
}

/// What the kernel adds up of some rows of an image: sums of bytes, `[width / 8][4 threads]` words.
std::vector<std::uint32_t> add_rows(const IntegerKeySlice& slice, const std::vector<int>& codes) {
  const std::vector<std::int8_t> image = slice.image();
  const bool narrow = slice.row_bits == 4;
  const int per_line = 64 * 8 / (slice.width * slice.row_bits);
  const auto words = static_cast<std::size_t>(slice.width / 2);
  std::vector<std::uint32_t> low(words, narrow ? 0 : 0x80808080u), high(words, 0);
  const bool split = slice.is_split;
  for (int piece = split ? -2 : 0; piece < slice.num_books; ++piece) {
    const int book = piece < 0 ? piece + 2 : piece;
    const int line = piece < 0 ? 0 : (split ? 1 : 0) + book / per_line;
    const std::int8_t* const row =
        image.data() + (line * slice.codebook_size + codes[static_cast<std::size_t>(book)]) * 128 +
        book % per_line * (128 / per_line);
    for (std::size_t w = 0; w < (narrow ? words / 2 : words); ++w) {
      std::uint32_t word;
      std::memcpy(&word, row + 4 * w, 4);
      low[w] += narrow ? word & 0x0f0f0f0fu : word;
      high[w] += word >> 4 & 0x0f0f0f0fu;
    }
  }
  // To [word k][thread q].
  std::vector<std::uint32_t> sums(words);
  const int pieces = narrow ? slice.width / 16 : slice.width / 8;
  for (int k = 0; k < pieces; ++k)
    for (int q = 0; q < 4; ++q) {
      const auto at = static_cast<std::size_t>((k / 4 * 4 + q) * 4 + k % 4);
      sums[static_cast<std::size_t>(k * 4 + q)] = low[at];
      if (narrow) sums[static_cast<std::size_t>((k + pieces) * 4 + q)] = high[at];
    }
  return sums;
}

TEST_P(DeviceLayout, FourIntegersAddUpInOneWord) {
  const Shape& shape = GetParam();
  const DevicePageLayout layout = layout_of(shape);
  Rng rng(3);
  const auto codec = testing_support::random_key_codec(rng, key_config(shape), 1);
  const int width = slice_width(codec->config());
  const int row_bits = layout.key_row_bits;
  const IntegerKeySlice slice(codec->codebook(0), layout.planes[0], 0,
                              std::min(width, shape.group_pairs), width, row_bits);
  for (int trial = 0; trial < 20; ++trial) {
    std::vector<int> expected(static_cast<std::size_t>(2 * width), 0), codes;
    for (int book = 0; book < slice.num_books; ++book) {
      codes.push_back(static_cast<int>(rng() % static_cast<unsigned>(slice.codebook_size)));
      for (int i = 0; i < 2 * width; ++i)
        expected[static_cast<std::size_t>(i)] += slice.rows[static_cast<std::size_t>(
            (book * slice.codebook_size + codes.back()) * 2 * width + i)];
    }
    const std::vector<std::uint32_t> words = add_rows(slice, codes);
    for (int k = 0; k < width / 8; ++k)
      for (int q = 0; q < 4; ++q)
        for (int byte = 0; byte < 4; ++byte) {
          const std::uint32_t word = words[static_cast<std::size_t>(k * 4 + q)];
          const int value = static_cast<int>(word >> (8 * byte) & 0xff) - (row_bits == 4 ? 0 : 128);
          EXPECT_EQ(
              value,
              expected[static_cast<std::size_t>(byte / 2 * width + 8 * k + 2 * q + byte % 2)]);
        }
  }
}

TEST(KeyRowBits, AreFourForThePresetsAtHeadDim128) {
  const PairLayout pairs{128, 128, RopeLayout::kHalfSplit};
  const ValueCodecConfig values = ValueCodecConfig::paper_1bit(1024);
  for (const KeyCodecConfig& config :
       {KeyCodecConfig::paper_1bit(pairs), KeyCodecConfig::paper_2bit(pairs),
        KeyCodecConfig::commvq_1bit(pairs), KeyCodecConfig::commvq_2bit(pairs)}) {
    const DevicePageLayout layout(config, 8, values, 64, key_plane_bytes(90));
    EXPECT_EQ(layout.key_row_bits, 4) << config.num_stages;
    EXPECT_EQ(planes_of_slice(layout, 0), config.num_stages > 11 ? 2 : 1);
    // With less shared memory a plane holds fewer books.
    const DevicePageLayout small(config, 8, values, 64, key_plane_bytes(86));
    EXPECT_EQ(small.key_row_bits, 8) << config.num_stages;
  }
}

TEST(KeyPlaneBytes, FollowTheSharedMemoryOfABlock) {
  EXPECT_EQ(key_plane_bytes(100), key_plane_bytes(90));
  EXPECT_EQ(key_plane_bytes(89), key_plane_bytes(86));
  EXPECT_EQ(key_plane_bytes(120), key_plane_bytes(86));
  EXPECT_LT(key_plane_bytes(86), key_plane_bytes(80));
}

/// Stages up to the most that the device takes, and slices of one or two planes that have kernels.
TEST(KeyRowBits, PlanesOfAnyNumberOfStagesAreAddedUpTwoAtATime) {
  for (int stages = 1; stages <= 176; ++stages) {
    const DevicePageLayout layout = layout_of({128, 64, 64, stages, 8, 1, 64, 176 * 1024});
    ASSERT_EQ(layout.key_row_bits, 4);
    int books = 0;
    for (int plane = 0; plane < layout.num_planes; plane += planes_of_slice(layout, plane)) {
      const int planes = planes_of_slice(layout, plane);
      const int of_each = layout.planes[plane].num_books;
      EXPECT_LE(of_each, layout.kMostNarrowBooks) << stages;
      if (planes == 2) {
        EXPECT_GE(of_each, layout.kLeastPairedBooks) << stages;
        EXPECT_EQ(of_each, layout.planes[plane + 1].num_books) << stages;
      } else {
        EXPECT_EQ(of_each % 2, 0) << stages;
        EXPECT_EQ(plane + 1, layout.num_planes) << stages;
      }
      books += planes * of_each;
    }
    EXPECT_EQ(books, 2 * stages);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, DeviceLayout,
    testing::Values(Shape{128, 64, 64, 11, 8, 1, 64, 176 * 1024},        // the paper's 1 bit
                    Shape{128, 64, 64, 21, 8, 2, 32, 176 * 1024},        // and 2 bits: two planes
                    Shape{128, 64, 64, 11, 2, 1, 16, 56 * 1024},         // little shared memory
                    Shape{128, 64, 64, 6, 2, 1, 64, 176 * 1024, true},   // few stages
                    Shape{128, 64, 64, 13, 2, 1, 64, 176 * 1024, true},  // planes of 13 books
                    Shape{128, 64, 64, 40, 2, 2, 32, 176 * 1024, true},  // four planes
                    Shape{64, 32, 64, 5, 4, 1, 16, 176 * 1024},          // half-width rows
                    Shape{256, 64, 64, 11, 1, 1, 128, 176 * 1024},       // two groups
                    Shape{128, 64, 128, 4, 8, 1, 64, 176 * 1024},        // few wide books
                    Shape{128, 64, 64, 20, 8, 2, 64, 176 * 1024, true},  // a norm a head
                    Shape{128, 16, 37, 3, 2, 2, 64, 176 * 1024}));       // odd sizes

TEST(DeviceLayoutRefusals, NameBlocksOfValues) {
  const PairLayout pairs{128, 128, RopeLayout::kHalfSplit};
  EXPECT_THAT(
      [&] {
        DevicePageLayout(KeyCodecConfig::commvq_1bit(pairs), 8,
                         ValueCodecConfig::speed_1bit(1024, 8), 64, key_plane_bytes(90));
      },
      testing::ThrowsMessage<Error>(
          testing::HasSubstr("num_blocks 8; with these key codes the device supports 1")));
}

TEST(DeviceLayoutRefusals, NameGradedCodesOfOneSide) {
  const PairLayout pairs{128, 128, RopeLayout::kHalfSplit};
  KeyCodecConfig keys = KeyCodecConfig::speed_1bit(pairs);
  ValueCodecConfig values = ValueCodecConfig::speed_1bit(384, 3);
  keys.graded = true;
  values.graded = false;
  EXPECT_THAT([&] { DevicePageLayout(keys, 3, values, 32, key_plane_bytes(90)); },
              testing::ThrowsMessage<Error>(testing::HasSubstr(
                  "graded is true for the keys and false for the values; the device supports")));
}

TEST(DeviceLayout, KeepsBinaryTokens) {
  const PairLayout pairs{128, 128, RopeLayout::kHalfSplit};
  std::mt19937_64 rng(3);
  for (int shape = 0; shape < 4; ++shape) {
    const bool two = shape / 2 == 1;
    KeyCodecConfig keys =
        two ? KeyCodecConfig::speed_2bit(pairs) : KeyCodecConfig::speed_1bit(pairs);
    ValueCodecConfig values =
        two ? ValueCodecConfig::speed_2bit(384, 3) : ValueCodecConfig::speed_1bit(384, 3);
    keys.graded = values.graded = shape % 2 == 1;
    const DevicePageLayout layout(keys, 3, values, 32, key_plane_bytes(90));
    ASSERT_TRUE(layout.is_binary());
    EXPECT_EQ(layout.graded, keys.graded);
    EXPECT_EQ(layout.bytes_per_token(), two ? 3 * (31 + 2 + 32 + 2) : 3 * (15 + 2 + 16 + 2));
    struct Token {
      std::vector<std::uint16_t> codes, norms, scales;
      std::vector<std::uint8_t> value;
    };
    std::vector<std::uint8_t> page(static_cast<std::size_t>(layout.page_bytes));
    std::vector<Token> tokens(32);
    for (int slot = 0; slot < 32; ++slot) {
      Token& token = tokens[static_cast<std::size_t>(slot)];
      for (int i = 0; i < 3 * keys.num_codes(); ++i)
        token.codes.push_back(static_cast<std::uint16_t>(rng() % 2));
      for (int i = 0; i < 3; ++i) {
        token.norms.push_back(static_cast<std::uint16_t>(rng()));
        token.scales.push_back(static_cast<std::uint16_t>(rng()));
      }
      for (int i = 0; i < values.num_code_bits() / 8; ++i)
        token.value.push_back(static_cast<std::uint8_t>(rng()));
      put_token(layout, page.data(), slot, token.codes.data(), token.norms.data(),
                token.value.data(), token.scales.data());
    }
    for (int slot = 0; slot < 32; ++slot) {
      const Token& token = tokens[static_cast<std::size_t>(slot)];
      Token read = token;
      for (auto* numbers : {&read.codes, &read.norms, &read.scales})
        std::fill(numbers->begin(), numbers->end(), std::uint16_t{9});
      get_token(layout, page.data(), slot, read.codes.data(), read.norms.data(), read.value.data(),
                read.scales.data());
      EXPECT_EQ(read.codes, token.codes);
      EXPECT_EQ(read.norms, token.norms);
      EXPECT_EQ(read.scales, token.scales);
      EXPECT_EQ(read.value, token.value);
    }
  }
}

TEST(DeviceLayoutRefusals, NameTheLimit) {
  const Shape good{128, 64, 64, 11, 8, 1, 64, 176 * 1024};
  const auto message_of = [](const Shape& shape) -> std::string {
    try {
      layout_of(shape);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_EQ(message_of(good), "no error");
  Shape shape = good;
  shape.page_size = 48;
  EXPECT_THAT(message_of(shape), testing::HasSubstr("page_size is 48"));
  shape = good;
  shape.head_dim = 96;
  shape.group_pairs = 48;
  EXPECT_THAT(message_of(shape), testing::HasSubstr("head_dim is 96"));
  shape = good;
  shape.codebook_size = 4096;
  EXPECT_THAT(message_of(shape), testing::HasSubstr("codebook_size is 4096"));
  shape = good;
  shape.num_stages = 300;
  EXPECT_THAT(message_of(shape), testing::HasSubstr("planes"));
}

}  // namespace
}  // namespace commvq::cuda
