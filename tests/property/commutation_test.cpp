// Rows of complex numbers commute with RoPE: decoding and rotating, rotating the codebook and
// decoding, and rotating the query backwards give the same scores.
#include <complex>
#include <numeric>
#include <random>
#include <vector>

#include "commvq/key_codec/codebook.hpp"
#include "commvq/rope/rope.hpp"

#include <gtest/gtest.h>

namespace commvq {
namespace {

struct Case {
  PairLayout pairs;
  RopeScaling scaling;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const int head_dim : {64, 96, 128, 256})
    for (const int rotary_dim : {head_dim, head_dim / 2})
      for (const RopeLayout layout : {RopeLayout::kHalfSplit, RopeLayout::kInterleaved})
        for (const RopeScaling scaling :
             {RopeScaling::kNone, RopeScaling::kLinear, RopeScaling::kLlama3})
          all.push_back({{head_dim, rotary_dim, layout}, scaling});
  return all;
}

class Commutation : public testing::TestWithParam<Case> {
 protected:
  Commutation() : rng_(static_cast<std::uint64_t>(GetParam().pairs.head_dim)) {
    rope_config_.pairs = GetParam().pairs;
    rope_config_.theta = 5e5;
    rope_config_.scaling = GetParam().scaling;
    if (GetParam().scaling != RopeScaling::kNone) rope_config_.factor = 8;
  }

  std::vector<double> normals(std::size_t count) {
    std::normal_distribution<double> normal;
    std::vector<double> values(count);
    for (double& value : values) value = normal(rng_);
    return values;
  }
  Index random_position() {
    return std::uniform_int_distribution<Index>(0, 1'000'000)(rng_);
  }
  /// Complex number e^{j n frequency} of a pair from first principles.
  static std::complex<double> turn(const Rope& rope, int pair, Index position) {
    return std::polar(1.0, static_cast<double>(position) * rope.frequency(pair));
  }

  std::mt19937_64 rng_;
  RopeConfig rope_config_;
};

/// A codebook whose rows are multiplied by the rotation of a position.
KeyCodebook<double> rotated(KeyCodebook<double> codebook, const Rope& rope, Index position) {
  const KeyCodecConfig& config = codebook.config;
  const int g = config.group_pairs, num_pairs = config.pairs.num_pairs();
  std::vector<double> rotation(static_cast<std::size_t>(2 * num_pairs));
  rope.rotation_at(position, rotation.data());
  for (int group = 0; group < config.num_groups(); ++group) {
    std::vector<double> part;
    for (const int begin : {group * g, num_pairs + group * g})
      part.insert(part.end(), rotation.begin() + begin, rotation.begin() + begin + g);
    for (int stage = 0; stage < config.num_stages; ++stage)
      for (int which = 0; which < 2; ++which)
        for (int c = 0; c < config.codebook_size; ++c)
          Rope::rotate_planar(codebook.book(group, stage, which) + c * codebook.row_size(),
                              part.data(), g);
  }
  return codebook;
}

TEST_P(Commutation, DecodeThenRotateEqualsRotateThenDecode) {
  const Rope rope(rope_config_);
  KeyCodecConfig config;
  config.pairs = rope_config_.pairs;
  config.group_pairs = config.pairs.num_pairs() / 2;
  config.codebook_size = 8;
  config.num_stages = 3;
  for (const bool tied : {true, false}) {
    config.tied = tied;
    KeyCodebook<double> codebook(config);
    codebook.rows = normals(codebook.rows.size());
    if (tied) codebook.derive_tied_books();
    for (const Index position : {Index{0}, Index{1}, Index{1'000'000}, random_position()}) {
      std::vector<std::uint16_t> codes(static_cast<std::size_t>(config.num_codes()));
      for (auto& code : codes) code = static_cast<std::uint16_t>(rng_() % 8);
      const auto size = static_cast<std::size_t>(config.pairs.head_dim);
      std::vector<double> planar(size), channels(size), rotated_planar(size), expected(size);
      decode_key(codebook, codes.data(), planar.data());
      config.pairs.from_planar(planar.data(), channels.data());
      rope.apply(as_matrix(channels, 1, config.pairs.head_dim), position);
      decode_key(rotated(codebook, rope, position), codes.data(), rotated_planar.data());
      config.pairs.from_planar(rotated_planar.data(), expected.data());
      for (std::size_t i = 0; i < size; ++i)
        EXPECT_NEAR(channels[i], expected[i], 1e-10) << "channel " << i << " at " << position;
    }
  }
}

TEST_P(Commutation, ApplyRotatesEveryPairByItsFrequency) {
  const Rope rope(rope_config_);
  const PairLayout& pairs = rope.pairs();
  const Index position = random_position();
  const std::vector<double> before = normals(static_cast<std::size_t>(2 * pairs.head_dim));
  std::vector<double> after = before;
  rope.apply(as_matrix(after, 1, 2 * pairs.head_dim), position);
  for (int head = 0; head < 2; ++head)
    for (int pair = 0; pair < pairs.num_pairs(); ++pair) {
      const int re = head * pairs.head_dim + pairs.real_channel(pair);
      const int im = head * pairs.head_dim + pairs.imag_channel(pair);
      const auto at = [](const std::vector<double>& v, int r, int i) {
        return std::complex<double>(v[static_cast<std::size_t>(r)], v[static_cast<std::size_t>(i)]);
      };
      EXPECT_NEAR(std::abs(at(before, re, im) * turn(rope, pair, position) - at(after, re, im)), 0,
                  1e-9);
      if (pair >= pairs.num_rotary_pairs()) {
        EXPECT_EQ(at(before, re, im), at(after, re, im));
      }
    }
}

TEST_P(Commutation, ScoreDependsOnTheDistanceAlone) {
  const Rope rope(rope_config_);
  const int head_dim = rope.pairs().head_dim;
  const std::vector<double> query = normals(static_cast<std::size_t>(head_dim));
  const std::vector<double> key = normals(query.size());
  const auto score = [&](Index query_position, Index key_position) {
    std::vector<double> q = query, k = key;
    rope.apply(as_matrix(q, 1, head_dim), query_position);
    rope.apply(as_matrix(k, 1, head_dim), key_position);
    return std::inner_product(q.begin(), q.end(), k.begin(), 0.0);
  };
  const Index distance = 1 + static_cast<Index>(rng_() % 5000);
  EXPECT_NEAR(score(distance, 0), score(1'000'000, 1'000'000 - distance), 1e-7);
}

std::string name_of_case(const testing::TestParamInfo<Case>& info) {
  const PairLayout& pairs = info.param.pairs;
  const char* scaling[] = {"plain", "linear", "llama3"};
  return std::to_string(pairs.head_dim) + "_" + std::to_string(pairs.rotary_dim) +
         (pairs.layout == RopeLayout::kHalfSplit ? "_half_" : "_interleaved_") +
         scaling[static_cast<int>(info.param.scaling)];
}

INSTANTIATE_TEST_SUITE_P(Layouts, Commutation, testing::ValuesIn(cases()), name_of_case);

}  // namespace
}  // namespace commvq
