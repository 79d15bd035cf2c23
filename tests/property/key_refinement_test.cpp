#include <random>

#include "commvq/learner/key_learner.hpp"
#include "reference/key_shape.hpp"
#include "reference/random_cache.hpp"

#include <gtest/gtest.h>

namespace commvq {
namespace {

using Shape = testing_support::KeyShape;

class KeyRefinementProperty : public testing::TestWithParam<std::tuple<Shape, int>> {};

TEST_P(KeyRefinementProperty, ObjectiveNeverRises) {
  const auto& [shape, seed] = GetParam();
  testing_support::Rng rng(static_cast<std::uint64_t>(seed));
  const Index tokens = 400;
  const std::vector<float> keys = testing_support::normal_floats(rng, tokens * shape.head_dim, 0.1);
  KeyLearnerOptions options;
  options.codec = shape.config();
  options.max_steps = 6;
  options.refinement.rounds = 4;
  options.refinement.beam_width = 4;
  options.seed = static_cast<std::uint64_t>(seed);
  KeyLearnerReport report;
  const KeyCodebook<float> codebook =
      learn_key_codebook(as_matrix(keys, tokens, shape.head_dim), options, &report);

  const std::vector<double>& objectives = report.refinement_objectives;
  ASSERT_EQ(objectives.size(), 9u);  // the start, then a solve and a re-encoding a round
  for (std::size_t i = 1; i < objectives.size(); ++i)
    EXPECT_LE(objectives[i], objectives[i - 1]) << "step " << i;
  EXPECT_LT(objectives.back(), 0.999 * objectives.front());

  // What is returned is what the report is about: encoding anew is at least about as good.
  std::vector<std::uint16_t> codes(static_cast<std::size_t>(tokens * options.codec.num_codes()));
  std::vector<float> errors(static_cast<std::size_t>(tokens));
  KeyEncoder<float>(codebook).encode(as_matrix(keys, tokens, shape.head_dim), 4,
                                     as_matrix(codes, tokens, options.codec.num_codes()),
                                     errors.data());
  double mean = 0;
  for (const float error : errors) mean += error / static_cast<double>(tokens);
  EXPECT_NEAR(mean, objectives.back(), 0.05 * mean);
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, KeyRefinementProperty,
    testing::Combine(testing::Values(Shape{16, 8, 8, 4, true}, Shape{16, 8, 8, 4, false},
                                     Shape{64, 16, 6, 2, true}, Shape{96, 48, 16, 3, false},
                                     Shape{64, 32, 2, 28, false, true},
                                     Shape{16, 4, 2, 8, false, true}),
                     testing::Range(1, 4)));

}  // namespace
}  // namespace commvq
