#include <numeric>
#include <random>
#include <vector>

#include "commvq/key_codec/encoder.hpp"
#include "commvq/learner/key_learner.hpp"
#include "reference/key_reference.hpp"

#include <gtest/gtest.h>

namespace commvq {
namespace {

struct Shape {
  int head_dim, group_pairs, codebook_size, num_stages;
  bool tied;
  bool weighted = false;
};

class BeamSearch : public testing::TestWithParam<Shape> {
 protected:
  BeamSearch() : rng_(7) {
    const Shape& shape = GetParam();
    config_.pairs = {shape.head_dim, shape.head_dim, RopeLayout::kHalfSplit};
    config_.group_pairs = shape.group_pairs;
    config_.codebook_size = shape.codebook_size;
    config_.num_stages = shape.num_stages;
    config_.tied = shape.tied;
  }

  template <class Scalar>
  std::vector<Scalar> normals(Index count, double deviation) {
    std::normal_distribution<double> normal(0, deviation);
    std::vector<Scalar> values(static_cast<std::size_t>(count));
    for (Scalar& value : values) value = static_cast<Scalar>(normal(rng_));
    return values;
  }

  /// A codebook whose stages shrink.
  template <class Scalar>
  KeyCodebook<Scalar> random_codebook() {
    KeyCodebook<Scalar> codebook(config_);
    double size = 0.5;
    for (int stage = 0; stage < config_.num_stages; ++stage, size *= 0.7)
      for (int group = 0; group < config_.num_groups(); ++group)
        for (int which = 0; which < 2; ++which) {
          const auto rows =
              normals<Scalar>(Index{config_.codebook_size} * codebook.row_size(), size);
          std::copy(rows.begin(), rows.end(), codebook.book(group, stage, which));
        }
    if (config_.tied) codebook.derive_tied_books();
    if (GetParam().weighted)
      for (int pair = 0; pair < config_.pairs.num_pairs(); ++pair)
        codebook.pair_weights.push_back(
            std::uniform_real_distribution<Scalar>(Scalar(0.2), Scalar(3))(rng_));
    return codebook;
  }

  struct Encoded {
    std::vector<std::uint16_t> codes;
    std::vector<double> errors;
    double total() const { return std::accumulate(errors.begin(), errors.end(), 0.0); }
  };
  template <class Scalar>
  Encoded encode(const KeyEncoder<Scalar>& encoder, std::vector<Scalar>& keys, int width) {
    const Index tokens = static_cast<Index>(keys.size()) / config_.pairs.head_dim;
    Encoded result;
    result.codes.resize(static_cast<std::size_t>(tokens * config_.num_codes()));
    std::vector<Scalar> errors(static_cast<std::size_t>(tokens));
    encoder.encode(as_matrix(keys, tokens, config_.pairs.head_dim), width,
                   as_matrix(result.codes, tokens, config_.num_codes()), errors.data());
    result.errors.assign(errors.begin(), errors.end());
    return result;
  }

  std::mt19937_64 rng_;
  KeyCodecConfig config_;
};

TEST_P(BeamSearch, WidthOneIsTheGreedyEncoder) {
  const KeyEncoder<double> encoder(random_codebook<double>());
  std::vector<double> keys = normals<double>(Index{150} * config_.pairs.head_dim, 1.0);
  const Encoded found = encode(encoder, keys, 1);
  for (Index t = 0; t < 150; ++t) {
    const auto expected = reference::encode_greedily(encoder.codebook(),
                                                     &keys[static_cast<std::size_t>(t) *
                                                           static_cast<std::size_t>(config_.pairs.head_dim)]);
    const auto begin = found.codes.begin() + t * config_.num_codes();
    EXPECT_EQ(expected, std::vector(begin, begin + config_.num_codes())) << "token " << t;
  }
}

TEST_P(BeamSearch, ReportedErrorIsTheErrorOfTheCodes) {
  const KeyEncoder<float> encoder(random_codebook<float>());
  std::vector<float> keys = normals<float>(Index{200} * config_.pairs.head_dim, 1.0);
  for (const int width : {1, 2, 8}) {
    const Encoded found = encode(encoder, keys, width);
    for (std::size_t t = 0; t < 200; ++t) {
      const double expected = reference::squared_error(
          encoder.codebook(), &keys[t * static_cast<std::size_t>(config_.pairs.head_dim)],
          &found.codes[t * static_cast<std::size_t>(config_.num_codes())]);
      EXPECT_NEAR(found.errors[t], expected, 1e-4 * (1 + expected));
    }
  }
}

// A wider beam may lose on a single key, where the greedy path goes through a candidate that the
// wider beam crowds out; over a few hundred keys it wins.
TEST_P(BeamSearch, WiderBeamLeavesLessError) {
  const KeyEncoder<float> encoder(random_codebook<float>());
  std::vector<float> keys = normals<float>(Index{400} * config_.pairs.head_dim, 1.0);
  const double greedy = encode(encoder, keys, 1).total();
  const double two = encode(encoder, keys, 2).total();
  const double eight = encode(encoder, keys, 8).total();
  EXPECT_LE(two, greedy);
  EXPECT_LE(eight, two);
  if (config_.num_stages > 1) {
    EXPECT_LT(eight, 0.999 * greedy);
  }
}

TEST_P(BeamSearch, LearntCodebookKeepsTheOrder) {
  std::vector<float> keys = normals<float>(Index{600} * config_.pairs.head_dim, 0.1);
  KeyLearnerOptions options;
  options.codec = config_;
  options.max_steps = 5;
  const Index tokens = 600;
  const KeyEncoder<float> encoder(
      learn_key_codebook(as_matrix(keys, tokens, config_.pairs.head_dim), options));
  const double greedy = encode(encoder, keys, 1).total();
  const double two = encode(encoder, keys, 2).total();
  EXPECT_LE(two, greedy);
  EXPECT_LE(encode(encoder, keys, 8).total(), two);
}

TEST_P(BeamSearch, ExhaustiveBeamFindsTheBestCodes) {
  config_.codebook_size = 3;
  config_.num_stages = 2;
  const KeyEncoder<double> encoder(random_codebook<double>());
  std::vector<double> keys = normals<double>(Index{20} * config_.pairs.head_dim, 1.0);
  const Encoded found = encode(encoder, keys, 81);
  if (config_.num_groups() > 1) GTEST_SKIP() << "trying all codes of several groups takes long";
  for (std::size_t t = 0; t < 20; ++t) {
    double least = 1e300;
    std::vector<std::uint16_t> codes(4);
    for (int all = 0; all < 81; ++all) {
      for (int i = 0, rest = all; i < 4; ++i, rest /= 3)
        codes[static_cast<std::size_t>(i)] = static_cast<std::uint16_t>(rest % 3);
      least = std::min(least, reference::squared_error(
                                  encoder.codebook(),
                                  &keys[t * static_cast<std::size_t>(config_.pairs.head_dim)],
                                  codes.data()));
    }
    EXPECT_NEAR(found.errors[t], least, 1e-9);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, BeamSearch,
                         testing::Values(Shape{64, 32, 16, 5, true}, Shape{96, 48, 64, 3, false},
                                         Shape{128, 64, 64, 4, true}, Shape{256, 64, 8, 3, false},
                                         Shape{64, 16, 16, 4, false, true},
                                         Shape{32, 16, 8, 3, true, true},
                                         Shape{16, 8, 5, 1, true}));

}  // namespace
}  // namespace commvq
