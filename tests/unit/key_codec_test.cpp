#include <cmath>
#include <limits>

#include "commvq/core/float16.hpp"
#include "commvq/key_codec/key_codec.hpp"
#include "reference/random_cache.hpp"

#include <gmock/gmock.h>

namespace commvq {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;
using testing_support::Rng;

constexpr int kHeads = 3;
constexpr Index kTokens = 70;

KeyCodecConfig small_config(bool norm_per_head = false) {
  KeyCodecConfig config;
  config.norm_per_head = norm_per_head;
  config.pairs = {16, 8, RopeLayout::kInterleaved};
  config.group_pairs = 4;
  config.codebook_size = 16;
  config.num_stages = 6;
  return config;
}

/// With one norm a token (false) and one a head (true).
class KeyCodecTest : public testing::TestWithParam<bool> {
 protected:
  KeyCodecTest()
      : codec_(testing_support::random_key_codec(rng_, small_config(GetParam()), kHeads)),
        keys_(testing_support::normal_floats(rng_, kTokens * channels(), 3.0)),
        codes_(static_cast<std::size_t>(kTokens * num_codes())),
        norms_(static_cast<std::size_t>(kTokens * codec_->num_norms())),
        decoded_(keys_.size()) {}

  static Index channels() { return Index{kHeads} * 16; }
  static Index num_codes() { return Index{kHeads} * small_config().num_codes(); }
  void encode() {
    codec_->encode(as_matrix(keys_, kTokens, channels()), as_matrix(codes_, kTokens, num_codes()),
                   norms_.data());
  }
  void decode() {
    codec_->decode(as_matrix(std::as_const(codes_), kTokens, num_codes()), norms_.data(),
                   as_matrix(decoded_, kTokens, channels()));
  }
  double squared(const std::vector<float>& values, Index token) const {
    return squared(values, token, 0, channels());
  }
  double squared(const std::vector<float>& values, Index token, Index first, Index count) const {
    double sum = 0;
    for (Index c = first; c < first + count; ++c)
      sum += std::pow(values[static_cast<std::size_t>(token * channels() + c)], 2);
    return sum;
  }

  Rng rng_{5};
  std::shared_ptr<const KeyCodec> codec_;
  std::vector<float> keys_;
  std::vector<std::uint16_t> codes_;
  std::vector<std::uint16_t> norms_;
  std::vector<float> decoded_;
};

TEST_P(KeyCodecTest, DecodedKeyIsNormTimesTheSumOfItsRows) {
  encode();
  decode();
  const KeyCodecConfig config = small_config();
  ASSERT_EQ(codec_->num_norms(), GetParam() ? kHeads : 1);
  for (Index t = 0; t < kTokens; ++t) {
    for (int head = 0; head < kHeads; ++head) {
      const Index at = GetParam() ? t * kHeads + head : t;
      const float norm = from_bf16(norms_[static_cast<std::size_t>(at)]);
      const double square =
          GetParam() ? squared(keys_, t, head * 16, 16) : squared(keys_, t, 0, channels());
      EXPECT_NEAR(norm, std::sqrt(square), 0.005 * norm);
      std::vector<float> planar(16), expected(16);
      decode_key(codec_->codebook(head),
                 &codes_[static_cast<std::size_t>(t * num_codes() + head * config.num_codes())],
                 planar.data());
      config.pairs.from_planar(planar.data(), expected.data());
      for (int c = 0; c < 16; ++c)
        EXPECT_FLOAT_EQ(decoded_[static_cast<std::size_t>(t * channels() + head * 16 + c)],
                        norm * expected[static_cast<std::size_t>(c)]);
    }
  }
}

TEST_P(KeyCodecTest, DecodingIsNearerThanNothing) {
  encode();
  decode();
  double error = 0, size = 0;
  for (Index t = 0; t < kTokens; ++t) size += squared(keys_, t);
  for (std::size_t i = 0; i < keys_.size(); ++i) error += std::pow(keys_[i] - decoded_[i], 2);
  EXPECT_LT(error, 0.5 * size);
}

TEST_P(KeyCodecTest, CodesDoNotDependOnTheKeysLength) {
  encode();
  const auto codes = codes_;
  for (float& key : keys_) key *= 1024;
  encode();
  EXPECT_EQ(codes, codes_);
}

TEST_P(KeyCodecTest, ZeroKeyDecodesToZeros) {
  std::fill_n(keys_.begin() + 5 * channels(), channels(), 0.0f);
  encode();
  decode();
  EXPECT_EQ(norms_[static_cast<std::size_t>(5 * codec_->num_norms())], 0);
  EXPECT_EQ(squared(decoded_, 5), 0);
  EXPECT_GT(squared(decoded_, 6), 0);
}

TEST_P(KeyCodecTest, NamesTokenAndChannelOfWhatIsNotFinite) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(),
                          std::numeric_limits<float>::infinity()}) {
    keys_[static_cast<std::size_t>(67 * channels() + 21)] = bad;
    EXPECT_THAT([&] { encode(); }, ThrowsMessage<Error>(AllOf(HasSubstr("67"), HasSubstr("21"))));
  }
}

TEST_P(KeyCodecTest, NormBeyondBf16IsRefused) {
  std::fill_n(keys_.begin() + channels(), channels(), 3e38f);
  EXPECT_THAT([&] { encode(); }, ThrowsMessage<Error>(HasSubstr("1")));
}

TEST_P(KeyCodecTest, TinyKeysKeepTheirDirection) {
  const std::vector<float> before = keys_;
  encode();
  const auto codes = codes_;
  for (float& key : keys_) key *= 0x1p-100f;
  encode();
  decode();
  EXPECT_EQ(codes, codes_);
  EXPECT_GT(squared(decoded_, 0), 0);
}

TEST_P(KeyCodecTest, ShapesAndCodesAreChecked) {
  EXPECT_THAT(
      [&] {
        codec_->encode({keys_.data(), kTokens, channels() - 1},
                       as_matrix(codes_, kTokens, num_codes()), norms_.data());
      },
      ThrowsMessage<Error>(HasSubstr("47")));
  encode();
  codes_[3] = 16;
  EXPECT_THAT([&] { decode(); }, ThrowsMessage<Error>(HasSubstr("16")));
}

TEST_P(KeyCodecTest, CodebooksMustFitTogetherAndBeFinite) {
  EXPECT_THROW(KeyCodec({}), Error);
  KeyCodecConfig other = small_config();
  other.num_stages = 5;
  EXPECT_THROW(KeyCodec({codec_->codebook(0), KeyCodebook<float>(other)}), Error);
  KeyCodebook<float> bad = codec_->codebook(0);
  bad.rows[17] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(KeyCodec({bad}), Error);
  bad.rows.pop_back();
  EXPECT_THROW(KeyCodec({bad}), Error);
  KeyCodebook<float> weighted = codec_->codebook(0);
  weighted.pair_weights.assign(8, 1.0f);
  EXPECT_NO_THROW(KeyCodec({weighted, weighted}));
  EXPECT_THROW(KeyCodec({weighted, codec_->codebook(0)}), Error);
  weighted.pair_weights[3] = 0;
  EXPECT_THAT([&] { KeyCodec({weighted}); }, ThrowsMessage<Error>(HasSubstr("pair weight 3 is 0")));
  weighted.pair_weights.pop_back();
  EXPECT_THAT([&] { KeyCodec({weighted}); }, ThrowsMessage<Error>(HasSubstr("7 pair weights")));
}

TEST_P(KeyCodecTest, CountsBitsExactly) {
  const Index code_bits = Index{kHeads} * 2 * 6 * 2 * 4;  // groups, stages, codes, bits
  EXPECT_EQ(codec_->bits_per_token(), code_bits + 16 * (GetParam() ? kHeads : 1));
}

INSTANTIATE_TEST_SUITE_P(Norms, KeyCodecTest, testing::Bool());

TEST(KeyCodecConfigTest, PaperPresetsCountTheirBits) {
  for (const int head_dim : {64, 96, 128, 256}) {
    const PairLayout pairs{head_dim, head_dim, RopeLayout::kHalfSplit};
    const KeyCodecConfig one = KeyCodecConfig::paper_1bit(pairs);
    const KeyCodecConfig two = KeyCodecConfig::paper_2bit(pairs);
    EXPECT_NO_THROW(one.validate());
    EXPECT_LE(one.bits_per_head(), 1.04 * head_dim);
    EXPECT_LE(two.bits_per_head(), 2.0 * head_dim);
    EXPECT_GE(two.bits_per_head(), 1.8 * head_dim);
  }
  const KeyCodecConfig paper = KeyCodecConfig::paper_1bit({});
  EXPECT_EQ(paper.bits_per_head(), 132);
  EXPECT_EQ(KeyCodecConfig::paper_2bit({}).bits_per_head(), 252);
}

TEST(KeyCodecConfigTest, OwnPresetsDecodeAtMostAsManyRowsAsThePapers) {
  for (const int head_dim : {64, 96, 128, 256}) {
    const PairLayout pairs{head_dim, head_dim, RopeLayout::kHalfSplit};
    const KeyCodecConfig one = KeyCodecConfig::commvq_1bit(pairs);
    const KeyCodecConfig two = KeyCodecConfig::commvq_2bit(pairs);
    EXPECT_LE(one.num_codes(), KeyCodecConfig::paper_1bit(pairs).num_codes());
    EXPECT_LE(two.num_codes(), KeyCodecConfig::paper_2bit(pairs).num_codes());
    for (const KeyCodecConfig& config : {one, two}) {
      EXPECT_NO_THROW(config.validate());
      EXPECT_FALSE(config.tied);
      EXPECT_TRUE(config.norm_per_head);
      EXPECT_EQ(config.beam_width, 8);
    }
  }
}

TEST(KeyCodecConfigTest, SpeedPresetsAreBinaryCodesOfWholeHeads) {
  for (const int head_dim : {2, 64, 96, 128, 256, 1024}) {
    const PairLayout pairs{head_dim, head_dim, RopeLayout::kHalfSplit};
    for (const KeyCodecConfig& config :
         {KeyCodecConfig::speed_1bit(pairs), KeyCodecConfig::speed_2bit(pairs)}) {
      EXPECT_NO_THROW(config.validate());
      EXPECT_EQ(config.num_groups(), 1);
      EXPECT_EQ(config.code_bits(), 1);
      EXPECT_FALSE(config.tied);
      EXPECT_TRUE(config.norm_per_head);
      EXPECT_EQ(config.beam_width, 8);
      EXPECT_EQ(config.graded, config.num_stages % 4 == 0);
    }
  }
  EXPECT_TRUE(KeyCodecConfig::speed_1bit({}).graded);
  EXPECT_TRUE(KeyCodecConfig::speed_2bit({}).graded);
  EXPECT_EQ(KeyCodecConfig::speed_1bit({}).bits_per_head(), 120);
  EXPECT_EQ(KeyCodecConfig::speed_2bit({}).bits_per_head(), 248);
}

TEST(KeyCodecConfigTest, GradedBitsAreNumbersMostSignificantBitFirst) {
  // A byte holds numbers below 8, 4, 4 and 2; as many of them as stages.
  std::vector<int> largest(8, 0);
  for (int book = 0; book < 16; ++book) {
    const GradedBit bit = graded_bit(book);
    largest[static_cast<std::size_t>(bit.number)] += bit.weight;
    if (bit.weight == 1) continue;
    EXPECT_EQ(graded_bit(book + 1).number, bit.number) << "book " << book;
    EXPECT_EQ(2 * graded_bit(book + 1).weight, bit.weight) << "book " << book;
  }
  EXPECT_THAT(largest, testing::ElementsAre(7, 3, 3, 1, 7, 3, 3, 1));
}

/// Two groups of four stages.
KeyCodecConfig graded_config() {
  KeyCodecConfig config = small_config(true);
  config.codebook_size = 2;
  config.num_stages = 4;
  config.tied = false;
  config.graded = true;
  return config;
}

TEST(GradedKeyCodec, DerivedRowsAreExactMultiples) {
  Rng rng(8);
  for (const double size : {1.0, 1e-20, 1e15}) {
    KeyCodebook<float> codebook(graded_config());
    codebook.rows = testing_support::normal_floats(rng, Index(codebook.rows.size()), size);
    const std::vector<float> given = codebook.rows;
    codebook.derive_graded_rows();
    for (int group = 0; group < 2; ++group)
      for (int i = 0; i < codebook.row_size(); ++i) {
        const auto step = [&](int book) { return codebook.difference(group, book, i); };
        EXPECT_EQ(step(0), 4 * step(2));
        for (const int book : {1, 3, 5}) EXPECT_EQ(step(book), 2 * step(book + 1));
      }
    for (std::size_t row = 0; row < given.size() / 8; row += 2)
      for (std::size_t i = 0; i < 8; ++i)
        EXPECT_NEAR(codebook.rows[row * 8 + i], given[row * 8 + i], 1e-5 * size);
    const std::vector<float> once = codebook.rows;
    codebook.derive_graded_rows();
    EXPECT_EQ(codebook.rows, once);
    EXPECT_NO_THROW(KeyCodec({codebook}));
  }
}

TEST(GradedKeyCodec, RefusesRowsThatAreNot) {
  Rng rng(8);
  KeyCodebook<float> codebook =
      testing_support::random_key_codec(rng, graded_config(), 1)->codebook(0);
  codebook.book(1, 1, 1)[codebook.row_size() + 5] += 1e-3f;  // book 3, the upper bit of a number
  EXPECT_THAT(
      [&] { KeyCodec({codebook}); },
      ThrowsMessage<Error>(AllOf(HasSubstr("head 0 is not graded"), HasSubstr("group 1, channel 5"),
                                 HasSubstr("in book 3"), HasSubstr("2 times that of book 4"))));
  codebook.config.graded = false;
  EXPECT_NO_THROW(KeyCodec({codebook}));
}

TEST(KeyCodecConfigTest, NamesTheFieldThatIsOutOfRange) {
  const auto with = [](auto change) {
    return [change] {
      KeyCodecConfig config;
      change(config);
      config.validate();
    };
  };
  EXPECT_THAT(with([](auto& c) { c.group_pairs = 24; }), ThrowsMessage<Error>(HasSubstr("24")));
  EXPECT_THAT(with([](auto& c) { c.codebook_size = 1; }),
              ThrowsMessage<Error>(HasSubstr("codebook_size is 1")));
  EXPECT_THAT(with([](auto& c) { c.num_stages = 0; }), ThrowsMessage<Error>(HasSubstr("num_stages")));
  EXPECT_THAT(with([](auto& c) { c.beam_width = -1; }), ThrowsMessage<Error>(HasSubstr("-1")));
  EXPECT_THAT(with([](auto& c) { c.pairs.head_dim = 127; }), ThrowsMessage<Error>(HasSubstr("127")));
  EXPECT_THAT(with([](auto& c) { c.graded = true; }),
              ThrowsMessage<Error>(HasSubstr("codebook_size is 64; graded codes need 2")));
  const auto graded = [&](auto change) {
    return with([change](auto& c) {
      c = graded_config();
      change(c);
    });
  };
  EXPECT_NO_THROW(graded([](auto&) {})());
  EXPECT_THAT(graded([](auto& c) { c.tied = true; }), ThrowsMessage<Error>(HasSubstr("tied")));
  EXPECT_THAT(graded([](auto& c) { c.num_stages = 30; }),
              ThrowsMessage<Error>(HasSubstr("num_stages is 30; graded codes need a multiple of 4")));
}

}  // namespace
}  // namespace commvq
