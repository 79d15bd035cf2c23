// The order of codes in a device page, and codebooks in integers. Needs no device.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "commvq/core/error.hpp"
#include "commvq/cuda/device_codebooks.hpp"
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
    if (layout.key_row_bits == 8) {
      EXPECT_LE(IntegerKeySlice::image_bytes(slice_width(config), 8, plane.num_books,
                                             layout.codebook_size),
                GetParam().plane_bytes);
    }
    plane_bits += plane.num_books * layout.code_bits;
  }
  EXPECT_EQ(plane_bits, config.bits_per_head());
}

TEST_P(DeviceLayout, SumsOfIntegersKeepToTheirBoundAndDecodeToTheCodebook) {
  const Shape& shape = GetParam();
  const DevicePageLayout layout = layout_of(shape);
  Rng rng(2);
  const auto codec = testing_support::random_key_codec(rng, key_config(shape), shape.num_kv_heads);
  const KeyCodebook<float>& codebook = codec->codebook(0);
  const bool narrow = layout.key_row_bits == 4;
  for (int plane = 0; plane < layout.num_planes; plane += layout.planes_at_once) {
    const IntegerKeySlice slice(codebook, layout, plane,
                                layout.planes[plane].group * shape.group_pairs,
                                std::min(slice_width(codebook.config), shape.group_pairs));
    for (int channel = 0; channel < 2 * slice.width; ++channel) {
      int most = 0;
      for (int book = 0; book < slice.num_books; ++book) {
        int largest = 0;
        for (int c = 0; c < slice.codebook_size; ++c) {
          const int entry = slice.rows[static_cast<std::size_t>(
              (book * slice.codebook_size + c) * 2 * slice.width + channel)];
          EXPECT_TRUE(!narrow || entry >= 0);
          largest = std::max(largest, std::abs(entry));
        }
        most += largest;
      }
      EXPECT_LE(most, narrow ? 2047 : 127) << "plane " << plane << " channel " << channel;
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

/// Sums of some rows of an image in 8 bits as the kernel adds them up, four to a 32-bit word,
/// `[2][width]`.
std::vector<int> add_byte_rows(const IntegerKeySlice& slice, const std::vector<int>& codes) {
  const std::vector<std::int8_t> image = slice.image();
  const int per_line = 64 / slice.width;
  const auto words = static_cast<std::size_t>(slice.width / 2);
  std::vector<std::uint32_t> sums(words, 0x80808080u);
  for (int book = 0; book < slice.num_books; ++book)
    for (std::size_t w = 0; w < words; ++w) {
      std::uint32_t word;
      std::memcpy(
          &word,
          image.data() +
              (book / per_line * slice.codebook_size + codes[static_cast<std::size_t>(book)]) *
                  128 +
              book % per_line * (128 / per_line) + 4 * static_cast<int>(w),
          4);
      sums[w] += word;
    }
  std::vector<int> result(2 * static_cast<std::size_t>(slice.width));
  for (int k = 0; k < slice.width / 8; ++k)
    for (int q = 0; q < 4; ++q)
      for (int byte = 0; byte < 4; ++byte)
        result[static_cast<std::size_t>(byte / 2 * slice.width + 8 * k + 2 * q + byte % 2)] =
            static_cast<int>(
                sums[static_cast<std::size_t>((k / 4 * 4 + q) * 4 + k % 4)] >> (8 * byte) & 0xff) -
            128;
  return result;
}

/// The same in 4 bits: four threads read the rows of a line each, the tensor units add byte b of
/// word i of sixteen bytes, times the line's weight, to row i % 2, column 4 (i / 2) + b. The codes
/// of a line are those of the plane of its place, the first one's where the plane has no more.
std::vector<int> add_narrow_rows(const IntegerKeySlice& slice, const DevicePageLayout& layout,
                                 const std::vector<int>& codes) {
  const std::vector<std::int8_t> image = slice.image();
  const std::vector<int> line_weights = slice.line_weights();
  EXPECT_EQ(line_weights.size(),
            static_cast<std::size_t>(4 * KeySlice::narrow_groups(slice.num_books)));
  for (const IntegerKeySlice::Stage& stage : slice.stages)
    EXPECT_EQ(line_weights[static_cast<std::size_t>(stage.line)], stage.first);
  const auto width = static_cast<std::size_t>(slice.width);
  std::vector<int> result(2 * width);
  for (std::size_t line = 0; line < line_weights.size(); ++line)
    for (int which = 0; which < 2; ++which) {
      const KeyPlane& plane = layout.planes[line % 4];
      const int wanted = 2 * static_cast<int>(line / 4) + which;
      if (plane.num_books == 0) {
        EXPECT_EQ(line_weights[line], 0);
        continue;
      }
      const int code = codes[static_cast<std::size_t>(
          plane.book(wanted < plane.num_books ? wanted : which) - slice.first_book)];
      const std::int8_t* const row = image.data() +
                                     static_cast<Index>(line) * KeySlice::kNarrowLineBytes +
                                     code * 128 + which * 64;
      const std::size_t weight_at = std::min(line, std::size_t{8} + line % 4);
      const int weight = line_weights[weight_at];
      EXPECT_EQ(weight, line_weights[line]);
      for (std::size_t at = 0; at < 64; ++at) {
        const std::size_t part = at / 16, word = at % 16 / 4, byte = at % 4;
        const std::size_t pair = 16 * part + 8 * (word % 2) + 4 * (word / 2) + byte;
        const int both = static_cast<std::uint8_t>(row[at]);
        result[pair] += (both & 15) * weight;
        result[width + pair] += (both >> 4) * weight;
      }
    }
  return result;
}

TEST_P(DeviceLayout, ImagesAddUpToTheRows) {
  const Shape& shape = GetParam();
  const DevicePageLayout layout = layout_of(shape);
  Rng rng(3);
  const auto codec = testing_support::random_key_codec(rng, key_config(shape), 1);
  const int width = slice_width(codec->config());
  const IntegerKeySlice slice(codec->codebook(0), layout, 0, 0, std::min(width, shape.group_pairs));
  for (int trial = 0; trial < 20; ++trial) {
    std::vector<int> expected(static_cast<std::size_t>(2 * width), 0), codes;
    for (int book = 0; book < slice.num_books; ++book) {
      codes.push_back(static_cast<int>(rng() % static_cast<unsigned>(slice.codebook_size)));
      for (int i = 0; i < 2 * width; ++i)
        expected[static_cast<std::size_t>(i)] += slice.rows[static_cast<std::size_t>(
            (book * slice.codebook_size + codes.back()) * 2 * width + i)];
    }
    EXPECT_EQ(
        slice.row_bits == 4 ? add_narrow_rows(slice, layout, codes) : add_byte_rows(slice, codes),
        expected);
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
    EXPECT_EQ(layout.num_planes, 4) << config.num_stages;
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

/// Stages up to the most that the device takes: every one in one plane, of which four share the
/// stages of a kernel.
TEST(KeyRowBits, PlanesOfAnyNumberOfStagesHoldEveryStageOnce) {
  for (int stages = 1; stages <= 176; ++stages) {
    const DevicePageLayout layout = layout_of({128, 64, 64, stages, 8, 1, 64, 176 * 1024});
    ASSERT_EQ(layout.key_row_bits, 4);
    std::vector<int> seen(2 * static_cast<std::size_t>(stages));
    for (int first = 0; first < layout.num_planes; first += layout.planes_at_once) {
      int books = 0;
      for (int i = 0; i < layout.planes_at_once; ++i) {
        const KeyPlane& plane = layout.planes[first + i];
        books += plane.num_books;
        for (int k = 0; k < plane.num_books; ++k) ++seen[static_cast<std::size_t>(plane.book(k))];
        // A thread of a kernel for so many groups of stages has one of each, but for the last.
        const int most = layout.planes[first + layout.planes_at_once - 1].num_books;
        EXPECT_LE(plane.num_books, most);
        EXPECT_GE(plane.num_books + 2, most);
      }
      EXPECT_LE(books, layout.kMostNarrowBooks) << stages;
    }
    EXPECT_THAT(seen, testing::Each(1)) << stages;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, DeviceLayout,
    testing::Values(Shape{128, 64, 64, 11, 8, 1, 64, 176 * 1024},        // the paper's 1 bit
                    Shape{128, 64, 64, 21, 8, 2, 32, 176 * 1024},        // and 2 bits
                    Shape{128, 64, 64, 11, 2, 1, 16, 56 * 1024},         // little shared memory
                    Shape{128, 64, 64, 2, 2, 1, 64, 176 * 1024, true},   // planes without stages
                    Shape{128, 64, 64, 6, 2, 1, 64, 176 * 1024, true},   // two split stages
                    Shape{128, 64, 64, 13, 2, 1, 64, 176 * 1024, true},  // three
                    Shape{128, 64, 64, 40, 2, 2, 32, 176 * 1024, true},  // kernels take turns
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
