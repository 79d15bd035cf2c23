#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "commvq/attention/attention.hpp"
#include "commvq/core/float16.hpp"

#include <gmock/gmock.h>

#include "engine/evaluation.hpp"
#include "engine/generate.hpp"
#include "engine/peers/kivi.hpp"
#include "engine/peers/peer.hpp"
#include "engine/peers/rotation.hpp"
#include "engine/peers/vector_quantizer.hpp"
#include "reference/example_data.hpp"
#include "reference/instrumented.hpp"

namespace engine {
namespace {

using commvq::testing_support::repeats;
using commvq::testing_support::small_model;
using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

std::vector<float> normal_rows(Index count, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(static_cast<std::size_t>(count));
  for (float& x : rows) x = normal(random);
  return rows;
}

std::vector<float> round_trip(const PeerCodec& codec, const std::vector<float>& rows,
                              Index channels) {
  const Index tokens = static_cast<Index>(rows.size()) / channels;
  std::vector<float> decoded(rows.size());
  codec.decode(codec.encode(commvq::as_matrix(rows, tokens, channels)),
               commvq::as_matrix(decoded, tokens, channels));
  return decoded;
}

double squared_distance(const std::vector<float>& a, const std::vector<float>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0, std::plus<>(),
                            [](double x, double y) { return (x - y) * (x - y); });
}

/// A group's numbers as KIVI restores them, written out.
std::vector<float> kivi_reference(const std::vector<float>& group, int bits) {
  const auto [low, high] = std::minmax_element(group.begin(), group.end());
  const float zero = commvq::from_fp16(commvq::to_fp16(*low));
  const float scale = commvq::from_fp16(commvq::to_fp16((*high - *low) / float((1 << bits) - 1)));
  std::vector<float> restored;
  for (const float x : group) {
    const float code =
        std::min(std::max(std::round((x - zero) / scale), 0.0f), float((1 << bits) - 1));
    restored.push_back(zero + scale * code);
  }
  return restored;
}

TEST(Kivi, RestoresEveryGroupAsWrittenOut) {
  const Index tokens = 64, channels = 96;
  const std::vector<float> rows = normal_rows(tokens * channels, 3);
  for (const auto groups : {KiviCodec::Groups::kAlongTokens, KiviCodec::Groups::kAlongChannels})
    for (const int bits : {1, 2, 4}) {
      const KiviCodec codec(bits, groups, channels);
      const std::vector<float> decoded = round_trip(codec, rows, channels);
      const bool along_tokens = groups == KiviCodec::Groups::kAlongTokens;
      // Where element i of group number g lies.
      const auto place = [&](Index g, Index i) {
        return static_cast<std::size_t>(
            along_tokens ? (g / channels * 32 + i) * channels + g % channels : g * 32 + i);
      };
      for (Index g = 0; g < tokens * channels / 32; ++g) {
        std::vector<float> group;
        for (Index i = 0; i < 32; ++i) group.push_back(rows[place(g, i)]);
        const std::vector<float> expected = kivi_reference(group, bits);
        for (Index i = 0; i < 32; ++i)
          ASSERT_EQ(decoded[place(g, i)], expected[static_cast<std::size_t>(i)]);
      }
    }
}

TEST(Kivi, ErrsByHalfAStepAndKeepsConstantGroups) {
  const KiviCodec codec(2, KiviCodec::Groups::kAlongChannels, 32);
  const std::vector<float> rows = normal_rows(32, 5);
  const auto [low, high] = std::minmax_element(rows.begin(), rows.end());
  const std::vector<float> decoded = round_trip(codec, rows, 32);
  for (std::size_t i = 0; i < 32; ++i)
    EXPECT_LE(std::abs(decoded[i] - rows[i]), (*high - *low) / 3 * 0.5 * 1.01);
  EXPECT_EQ(round_trip(codec, std::vector<float>(32, 0.75f), 32), std::vector<float>(32, 0.75f));
}

TEST(Kivi, RefusesWhatItCannotCode) {
  EXPECT_THAT([] { KiviCodec(0, KiviCodec::Groups::kAlongTokens, 32); },
              ThrowsMessage<commvq::Error>(HasSubstr("0 bits")));
  EXPECT_THAT([] { KiviCodec(2, KiviCodec::Groups::kAlongChannels, 40); },
              ThrowsMessage<commvq::Error>(AllOf(HasSubstr("40"), HasSubstr("32"))));
}

// Max 1960, "Quantizing for minimum distortion", table I.
TEST(LloydMax, HasTheLevelsOfThePaper) {
  const auto near = [](std::vector<float> expected) {
    return testing::Pointwise(testing::FloatNear(1e-4f), expected);
  };
  EXPECT_THAT(lloyd_max_levels(1), near({-0.7979f, 0.7979f}));
  EXPECT_THAT(lloyd_max_levels(2), near({-1.5104f, -0.4528f, 0.4528f, 1.5104f}));
  const std::vector<float> eight = lloyd_max_levels(3);
  EXPECT_THAT(std::vector<float>(eight.begin() + 4, eight.end()),
              near({0.2451f, 0.7560f, 1.3439f, 2.1520f}));
  EXPECT_THROW(lloyd_max_levels(9), commvq::Error);
}

TEST(Rotation, ErrsAsLloydAndMaxForAnyDirection) {
  // The distortion of a normal variable at 1 and 2 bits; heads far from normal, of any length.
  const double expected[] = {0.3634, 0.1175};
  std::vector<float> rows = normal_rows(256 * 256, 7);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = i % 128 < 24 ? 20 * rows[i] : 0.01f;
  const std::vector<float> zeros(rows.size());
  for (const int bits : {1, 2}) {
    const RotationCodec codec(bits, 2, 128, 11);
    const std::vector<float> decoded = round_trip(codec, rows, 256);
    const double relative = squared_distance(rows, decoded) / squared_distance(rows, zeros);
    EXPECT_NEAR(relative / expected[bits - 1], 1, 0.03);
    EXPECT_EQ(round_trip(codec, zeros, 256), zeros);
    EXPECT_EQ(round_trip(RotationCodec(bits, 2, 128, 11), rows, 256), decoded);
    EXPECT_NE(round_trip(RotationCodec(bits, 2, 128, 12), rows, 256), decoded);
  }
}

TEST(KMeans, FindsClustersThatLieApart) {
  Points points(400, 3);
  std::mt19937_64 random(2);
  std::normal_distribution<float> normal;
  for (Index t = 0; t < points.rows(); ++t)
    for (Index c = 0; c < 3; ++c)
      points(t, c) = 10.0f * float((t % 4) >> (c % 2) & 1) + 0.1f * normal(random);
  const Points centroids = kmeans(points, 4, 5, random);
  const std::vector<std::uint16_t> clusters = nearest(points, centroids);
  for (Index t = 0; t < points.rows(); ++t) {
    const std::uint16_t cluster = clusters[static_cast<std::size_t>(t)];
    EXPECT_EQ(cluster, clusters[static_cast<std::size_t>(t % 4)]);
    EXPECT_LT((points.row(t) - centroids.row(cluster)).norm(), 1);
  }
}

TEST(KMeans, AssignsTheNearestAndNeverRaisesTheError) {
  std::mt19937_64 random(4);
  const std::vector<float> rows = normal_rows(700 * 5, 6);
  const Points points = Eigen::Map<const Points>(rows.data(), 700, 5);
  double last = std::numeric_limits<double>::infinity();
  for (const int iterations : {0, 1, 3, 10}) {
    std::mt19937_64 same(9);
    const Points centroids = kmeans(points, 20, iterations, same);
    const std::vector<std::uint16_t> clusters = nearest(points, centroids);
    double error = 0;
    for (Index t = 0; t < points.rows(); ++t) {
      const float distance =
          (points.row(t) - centroids.row(clusters[static_cast<std::size_t>(t)])).squaredNorm();
      for (Index c = 0; c < 20; ++c)
        EXPECT_LE(distance, (points.row(t) - centroids.row(c)).squaredNorm() + 1e-4f);
      error += distance;
    }
    EXPECT_LT(error, last);
    last = error;
  }
  EXPECT_THROW(kmeans(Points(0, 5), 2, 1, random), commvq::Error);
  EXPECT_THROW(kmeans(points, 0, 1, random), commvq::Error);
}

TEST(VectorQuantizer, RestoresWhatItHasRowsFor) {
  // 200 different tokens: 256 centroids keep each.
  const std::vector<float> rows = normal_rows(200 * 16, 8);
  VectorQuantizerOptions options;
  options.shape = {8, 1};
  const VectorQuantizer codec(commvq::as_matrix(rows, 200, 16), options);
  EXPECT_LT(squared_distance(round_trip(codec, rows, 16), rows), 1e-6);
}

TEST(VectorQuantizer, EveryStageLowersTheErrorOfUnseenTokens) {
  const Index channels = 32;
  const std::vector<float> rows = normal_rows(2000 * channels, 9);
  const std::vector<float> unseen = normal_rows(500 * channels, 10);
  VectorQuantizerOptions options;
  options.iterations = 4;
  double last = squared_distance(unseen, std::vector<float>(unseen.size()));
  for (const int stages : {1, 2, 4}) {
    options.shape = {16, stages};
    const VectorQuantizer codec(commvq::as_matrix(rows, 2000, channels), options);
    const double error = squared_distance(round_trip(codec, unseen, channels), unseen);
    EXPECT_LT(error, 0.9 * last) << stages;
    last = error;
  }
  options.shape = {24, 1};
  EXPECT_THAT([&] { VectorQuantizer(commvq::as_matrix(rows, 2000, channels), options); },
              ThrowsMessage<commvq::Error>(AllOf(HasSubstr("24"), HasSubstr("32"))));
}

TEST(Peer, CountsTheBitsThatItKeeps) {
  ModelConfig config = Model(small_model()).config();
  config.num_layers = 1;
  CalibrationData data;
  data.context = 64;
  const Index channels = config.kv_size();
  data.layers = {{normal_rows(64 * channels, 1), normal_rows(64 * channels, 2),
                  commvq::QueryStatistics(config.rope.pairs, 2)}};
  const auto bits = [&](const char* name) {
    return bits_per_number(Peer::parse(name).make_layers(config, data, 1), channels);
  };
  EXPECT_DOUBLE_EQ(bits("kivi_1bit"), 2.0);
  EXPECT_DOUBLE_EQ(bits("kivi_2bit_roped"), 3.0);
  EXPECT_DOUBLE_EQ(bits("kivi_4bit"), 5.0);
  EXPECT_DOUBLE_EQ(bits("rotation_1bit"), 1.125);
  EXPECT_DOUBLE_EQ(bits("rotation_2bit"), 2.125);
  EXPECT_DOUBLE_EQ(bits("pq_2bit"), 2.0);
  EXPECT_DOUBLE_EQ(bits("rq_1bit"), 1.0);
}

TEST(Peer, ParsesItsNameAndRefusesOthers) {
  const Peer peer = Peer::parse("pq_2bit_roped");
  EXPECT_EQ(peer.method, Peer::Method::kProduct);
  EXPECT_EQ(peer.bits, 2);
  EXPECT_TRUE(peer.keys_after_rope);
  EXPECT_TRUE(peer.learnt());
  EXPECT_FALSE(Peer::parse("kivi_4bit").keys_after_rope);
  for (const char* name : {"", "kivi", "kivi_3bit", "pq_1bit_rope", "opq_1bit"})
    EXPECT_THAT([&] { Peer::parse(name); }, ThrowsMessage<commvq::Error>(HasSubstr("kivi_2bit")));
  const Model model(small_model());
  EXPECT_THAT([&] { Peer::parse("rq_1bit").make_layers(model.config(), {}, 1); },
              ThrowsMessage<commvq::Error>(HasSubstr("calibration text")));
}

/// A codec that marks what went through it: numbers come back doubled.
class Doubling final : public PeerCodec {
 public:
  explicit Doubling(Index block) : block_(block) {}
  int code_bits() const override { return 16; }
  Index block_tokens() const override { return block_; }
  PeerCodes encode(MatrixView<const float> rows) const override {
    EXPECT_EQ(rows.rows % block_, 0);
    PeerCodes codes;
    for (Index t = 0; t < rows.rows; ++t)
      for (Index c = 0; c < rows.cols; ++c) codes.halves.push_back(commvq::to_fp16(2 * rows(t, c)));
    return codes;
  }
  void decode(const PeerCodes& codes, MatrixView<float> rows) const override {
    for (Index i = 0; i < rows.rows * rows.cols; ++i)
      rows.data[i] = commvq::from_fp16(codes.halves[static_cast<std::size_t>(i)]);
  }

 private:
  Index block_;
};

/// Softmax attention token by token in double precision over a peer's cache of `Doubling`s.
std::vector<double> attention_reference(const ModelConfig& config, const std::vector<float>& query,
                                        Index position, Index head, std::vector<float> keys,
                                        const std::vector<float>& values, Index window,
                                        Index sinks) {
  const Index head_dim = config.head_dim(), channels = config.kv_size();
  const Index channel = head / (config.num_q_heads / config.num_kv_heads) * head_dim;
  std::vector<float> rotated = query;
  const commvq::Rope rope(config.rope);
  rope.apply(MatrixView<float>(rotated.data(), 1, static_cast<Index>(query.size())), position);
  rope.apply(MatrixView<float>(keys.data(), position + 1, channels), 0);
  std::vector<double> sum(static_cast<std::size_t>(head_dim));
  double total = 0;
  for (Index t = 0; t <= position; ++t) {
    const double factor = t >= sinks && t <= position - window ? 2 : 1;
    double score = 0;
    for (Index i = 0; i < head_dim; ++i)
      score += double(rotated[static_cast<std::size_t>(head * head_dim + i)]) * factor *
               keys[static_cast<std::size_t>(t * channels + channel + i)];
    const double weight = std::exp(score / std::sqrt(double(head_dim)));
    total += weight;
    for (Index i = 0; i < head_dim; ++i)
      sum[static_cast<std::size_t>(i)] +=
          weight * factor * values[static_cast<std::size_t>(t * channels + channel + i)];
  }
  for (double& x : sum) x /= total;
  return sum;
}

TEST(PeerCache, ReadsTheWindowAndTheSinksExactlyAndTheRestAsCodes) {
  ModelConfig config;
  config.num_layers = 1;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.rope.pairs = {16, 16, commvq::RopeLayout::kHalfSplit};
  const Index tokens = 41, window = 9, sinks = 3;
  std::vector<float> keys = normal_rows(tokens * 32, 1), values = normal_rows(tokens * 32, 2);
  for (auto* rows : {&keys, &values})
    for (float& x : *rows) x = commvq::from_fp16(commvq::to_fp16(0.4f * x));
  const std::vector<float> queries = normal_rows(tokens * 64, 3);
  for (const bool after_rope : {false, true}) {
    PeerCache cache(config,
                    {{std::make_shared<Doubling>(8), std::make_shared<Doubling>(3), after_rope}},
                    window, sinks);
    std::vector<float> attended(queries.size());
    Index first = 0;
    for (const Index count : {1, 20, 2, 1, 17}) {  // in chunks of any size
      const auto rows = [&](auto& numbers, Index width) {
        return commvq::as_matrix(numbers, tokens, width).middle_rows(first, count);
      };
      cache.append_and_attend(0, rows(queries, 64), rows(std::as_const(keys), 32),
                              rows(std::as_const(values), 32), /*sliding_window=*/0,
                              rows(attended, 64));
      first += count;
      EXPECT_EQ(cache.length(), first);
    }
    for (Index t = 0; t < tokens; ++t)
      for (Index head = 0; head < 4; ++head) {
        const std::vector<float> query(queries.begin() + t * 64, queries.begin() + (t + 1) * 64);
        const std::vector<double> expected =
            attention_reference(config, query, t, head, keys, values, window, sinks);
        for (Index i = 0; i < 16; ++i)
          ASSERT_NEAR(attended[static_cast<std::size_t>(t * 64 + head * 16 + i)],
                      expected[static_cast<std::size_t>(i)], 3e-3)
              << t << " " << head << " " << after_rope;
      }
  }
}

TEST(PeerCache, RefusesAWindowSmallerThanABlock) {
  ModelConfig config;
  config.num_layers = 1;
  config.num_q_heads = config.num_kv_heads = 1;
  const std::vector<PeerLayer> layers = {
      {std::make_shared<KiviCodec>(2, KiviCodec::Groups::kAlongTokens, 128), nullptr, false}};
  EXPECT_THAT([&] { PeerCache(config, layers, 31, 0); },
              ThrowsMessage<commvq::Error>(AllOf(HasSubstr("31"), HasSubstr("32"))));
  EXPECT_THROW(PeerCache(config, {}, 128, 0), commvq::Error);
}

// The better a codec, the less it changes what the model says; exact codecs change nothing.
TEST(PeerCache, PredictsLikeTheExactCacheTheMoreBitsItHas) {
  const Model model(small_model());
  const std::vector<int> text = write_text(model, {{0}}, repeats(192, 96), 5)[0];
  commvq::Cache exact = model.make_cache({});
  const Predictions expected = predict(model, exact, text);
  const auto distance = [&](const std::vector<PeerLayer>& layers) {
    PeerCache cache(model.config(), layers, 32, 0);
    const Predictions got = predict(model, cache, text);
    double sum = 0;
    for (std::size_t i = 0; i < got.nll.size(); ++i)
      sum += std::abs(got.nll[i] - expected.nll[i]) / double(got.nll.size());
    return sum;
  };
  const auto of_peer = [&](const char* name) {
    return distance(Peer::parse(name).make_layers(model.config(), {}, 1));
  };
  EXPECT_LT(distance(std::vector<PeerLayer>(6)), 1e-3);
  const double eight = of_peer("kivi_8bit"), four = of_peer("kivi_4bit"),
               two = of_peer("kivi_2bit");
  EXPECT_LT(eight, 0.02);
  EXPECT_LT(eight, four);
  EXPECT_LT(four, two);
  EXPECT_LT(of_peer("rotation_4bit"), of_peer("rotation_1bit"));
}

}  // namespace
}  // namespace engine
