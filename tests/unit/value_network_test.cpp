// Gradients written by hand against finite differences, in double precision.
#include <cmath>
#include <random>

#include "learner/value_network.hpp"

#include <gtest/gtest.h>

namespace commvq {
namespace {

using Network = ValueNetwork<double>;

class ValueNetworkTest : public testing::TestWithParam<int> {
 protected:
  ValueNetworkTest() : network_(config()) {
    std::normal_distribution<double> normal;
    for (double& parameter : network_.parameters) parameter = 0.4 * normal(rng_);
    for (Index c = 0; c < 16; ++c) network_.value(network_.norm_gain)(0, c) += 1;
    units_.resize(kTokens, 16);
    for (Index i = 0; i < units_.size(); ++i) units_.data()[i] = normal(rng_);
    units_.rowwise().normalize();
    noise_.resize(kTokens, config().num_logits());
    for (Index i = 0; i < noise_.size(); ++i) noise_.data()[i] = normal(rng_);
  }

  static ValueCodecConfig config() {
    ValueCodecConfig config;
    config.num_channels = 16;
    config.bits = GetParam();
    config.hidden_size = 12;
    return config;
  }
  double loss(Network::Choice choice) { return network_.forward(units_, noise_, 0.7, choice); }

  double difference(std::size_t i, Network::Choice choice) {
    const double step = 1e-5, at = network_.parameters[i];
    network_.parameters[i] = at + step;
    const double up = loss(choice);
    network_.parameters[i] = at - step;
    const double down = loss(choice);
    network_.parameters[i] = at;
    return (up - down) / (2 * step);
  }
  void expect_gradients(const Network::Parameter& parameter, Network::Choice choice) {
    loss(choice);
    network_.backward();
    const std::vector<double> gradients = network_.gradients;
    double largest = 0;
    for (Index i = parameter.offset; i < parameter.offset + parameter.size(); ++i) {
      const auto at = static_cast<std::size_t>(i);
      EXPECT_NEAR(gradients[at], difference(at, choice), 1e-8) << "parameter " << i;
      largest = std::max(largest, std::abs(gradients[at]));
    }
    EXPECT_GT(largest, 1e-5) << "nothing to compare";
  }

  static constexpr Index kTokens = 9;
  std::mt19937_64 rng_{3};
  Network network_;
  Network::Matrix units_, noise_;
};

TEST_P(ValueNetworkTest, SoftGradientsEqualFiniteDifferences) {
  for (const auto& parameter :
       {network_.norm_gain, network_.norm_bias, network_.hidden_weight, network_.hidden_bias,
        network_.output_weight, network_.output_bias, network_.decoder})
    expect_gradients(parameter, Network::Choice::kSoft);
}

TEST_P(ValueNetworkTest, DecoderGradientsOfHardChoicesEqualFiniteDifferences) {
  expect_gradients(network_.decoder, Network::Choice::kHard);
}

// Straight through: with hard bits the encoder receives the soft choice's Jacobian times the
// gradient with respect to the hard bits. At a low temperature soft and hard bits coincide, and so
// do both losses.
TEST_P(ValueNetworkTest, HardLossIsTheLimitOfTheSoftOne) {
  const double hard = loss(Network::Choice::kHard);
  EXPECT_NEAR(network_.forward(units_, noise_, 1e-4, Network::Choice::kSoft), hard, 1e-3);
  EXPECT_GT(std::abs(loss(Network::Choice::kSoft) - hard), 1e-3);
}

TEST_P(ValueNetworkTest, HardChoicesSendGradientsToTheEncoder) {
  loss(Network::Choice::kHard);
  network_.backward();
  EXPECT_GT(network_.gradient(network_.hidden_weight).norm(), 1e-4);
  EXPECT_GT(network_.gradient(network_.output_weight).norm(), 1e-4);
}

INSTANTIATE_TEST_SUITE_P(Bits, ValueNetworkTest, testing::Values(1, 2));

}  // namespace
}  // namespace commvq
