#include "commvq/learner/query_statistics.hpp"

#include <cmath>
#include <limits>

#include "commvq/rope/rope.hpp"

#include <gmock/gmock.h>

#include "reference/random_cache.hpp"

namespace commvq {
namespace {

constexpr PairLayout kPairs{12, 8, RopeLayout::kInterleaved};
constexpr int kKvHeads = 2, kQHeads = 6;
constexpr Index kTokens = 40, kChannels = Index{kQHeads} * 12;

std::vector<float> some_queries() {
  testing_support::Rng rng(21);
  std::vector<float> queries = testing_support::normal_floats(rng, kTokens * kChannels);
  for (std::size_t i = 0; i < queries.size(); ++i) queries[i] *= 1.0f + static_cast<float>(i % 12);
  return queries;
}

std::vector<float> weights_of(const std::vector<float>& queries) {
  QueryStatistics statistics(kPairs, kKvHeads);
  statistics.add(as_matrix(queries, kTokens, kChannels));
  return statistics.pair_weights();
}

TEST(QueryStatistics, WeightsAreRootMeanSquaresOfComplexQueries) {
  const std::vector<float> queries = some_queries();
  const std::vector<float> weights = weights_of(queries);
  ASSERT_EQ(weights.size(), 12u);
  for (int kv_head = 0; kv_head < kKvHeads; ++kv_head) {
    double squares[6] = {}, mean = 0;
    for (int pair = 0; pair < 6; ++pair) {
      for (Index t = 0; t < kTokens; ++t)
        for (int head = 3 * kv_head; head < 3 * kv_head + 3; ++head) {
          const float* const query = &queries[static_cast<std::size_t>(t * kChannels + head * 12)];
          // Interleaved: 2i and 2i + 1 among the rotary channels, and among the others.
          squares[pair] += std::pow(query[2 * pair], 2) + std::pow(query[2 * pair + 1], 2);
        }
      mean += squares[pair] / 6;
    }
    for (int pair = 0; pair < 6; ++pair)
      EXPECT_NEAR(weights[static_cast<std::size_t>(6 * kv_head + pair)],
                  std::sqrt(squares[pair] / mean), 1e-5);
  }
}

TEST(QueryStatistics, RotationAndChunksDoNotMatter) {
  const std::vector<float> queries = some_queries();
  std::vector<float> rotated = queries;
  RopeConfig config;
  config.pairs = kPairs;
  Rope(config).apply(as_matrix(rotated, kTokens, kChannels), 1000);
  QueryStatistics statistics(kPairs, kKvHeads);
  const auto rows = as_matrix(std::as_const(rotated), kTokens, kChannels);
  statistics.add(rows.middle_rows(0, 7));
  statistics.add(rows.middle_rows(7, kTokens - 7));
  const std::vector<float> expected = weights_of(queries), weights = statistics.pair_weights();
  for (std::size_t i = 0; i < weights.size(); ++i) EXPECT_NEAR(weights[i], expected[i], 1e-4);
}

TEST(QueryStatistics, AddUp) {
  const std::vector<float> queries = some_queries();
  const auto rows = as_matrix(std::as_const(queries), kTokens, kChannels);
  QueryStatistics first(kPairs, kKvHeads), second(kPairs, kKvHeads);
  first.add(rows.middle_rows(0, 7));
  second.add(rows.middle_rows(7, kTokens - 7));
  first.add(second);
  const std::vector<float> expected = weights_of(queries), weights = first.pair_weights();
  for (std::size_t i = 0; i < weights.size(); ++i) EXPECT_NEAR(weights[i], expected[i], 1e-5);
  EXPECT_THROW(first.add(QueryStatistics(kPairs, kKvHeads + 1)), Error);
}

TEST(QueryStatistics, NoWeightIsZero) {
  std::vector<float> queries(static_cast<std::size_t>(kTokens * kChannels));
  for (const float weight : weights_of(queries)) EXPECT_EQ(weight, 1.0f);
  queries[0] = 1.0f;  // one pair of head 0
  const std::vector<float> weights = weights_of(queries);
  EXPECT_NEAR(weights[0], std::sqrt(6.0f), 1e-5);
  EXPECT_EQ(weights[1], QueryStatistics::kMinWeight);
  EXPECT_EQ(weights[6], 1.0f);
}

TEST(QueryStatistics, BadInputIsNamed) {
  EXPECT_THROW(QueryStatistics(kPairs, 0), Error);
  QueryStatistics statistics(kPairs, kKvHeads);
  std::vector<float> queries = some_queries();
  EXPECT_THAT(
      [&] {
        statistics.add({queries.data(), kTokens, 36});
      },
      testing::ThrowsMessage<Error>(testing::HasSubstr("36")));
  queries[5] = std::numeric_limits<float>::infinity();
  EXPECT_THROW(statistics.add(as_matrix(queries, kTokens, kChannels)), Error);
  for (const float weight : statistics.pair_weights()) EXPECT_EQ(weight, 1.0f);
}

}  // namespace
}  // namespace commvq
