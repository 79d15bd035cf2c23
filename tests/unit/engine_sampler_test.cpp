#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "commvq/core/error.hpp"

#include <gmock/gmock.h>

#include "engine/sampler.hpp"

namespace engine {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

const std::vector<float> kLogits = {1.0f, 3.0f, 2.0f, 3.0f, -4.0f};

/// How often each token comes up among `draws`.
std::vector<double> frequencies(const SamplerOptions& options, int draws = 40000) {
  Sampler sampler(options);
  std::vector<double> share(kLogits.size());
  for (int i = 0; i < draws; ++i)
    share[static_cast<std::size_t>(sampler.pick(kLogits))] += 1.0 / draws;
  return share;
}

std::vector<double> softmax(double temperature, const std::set<std::size_t>& kept) {
  std::vector<double> p(kLogits.size());
  double sum = 0;
  for (const std::size_t i : kept) sum += p[i] = std::exp(double(kLogits[i]) / temperature);
  for (double& value : p) value /= sum;
  return p;
}

/// Four standard deviations of a share of 40,000 draws are at most 0.01.
void expect_shares(const std::vector<double>& found, const std::vector<double>& expected) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(found[i], expected[i], 0.01) << "token " << i;
    if (expected[i] == 0) {
      EXPECT_EQ(found[i], 0) << "token " << i;
    }
  }
}

TEST(Sampler, TemperatureZeroTakesTheFirstOfTheLargest) {
  Sampler sampler(SamplerOptions{});
  for (int i = 0; i < 10; ++i) EXPECT_EQ(sampler.pick(kLogits), 1);
  EXPECT_EQ(most_probable(kLogits), 1);
}

TEST(Sampler, DrawsFromTheSoftmax) {
  for (const double temperature : {0.7, 1.0, 2.0}) {
    SamplerOptions options;
    options.temperature = temperature;
    expect_shares(frequencies(options), softmax(temperature, {0, 1, 2, 3, 4}));
  }
}

TEST(Sampler, TopKKeepsTheMostProbable) {
  SamplerOptions options;
  options.temperature = 1;
  options.top_k = 3;
  expect_shares(frequencies(options), softmax(1, {1, 2, 3}));
  options.top_k = 1;
  expect_shares(frequencies(options, 100), softmax(1, {1}));
  options.top_k = 100;
  expect_shares(frequencies(options), softmax(1, {0, 1, 2, 3, 4}));
}

TEST(Sampler, TopPKeepsTheFewestThatReachIt) {
  SamplerOptions options;
  options.temperature = 1;
  options.top_p = 0.5;  // the two largest have 0.40 each
  expect_shares(frequencies(options), softmax(1, {1, 3}));
  options.top_p = 0.9;
  expect_shares(frequencies(options), softmax(1, {1, 2, 3}));
  options.top_p = 1e-9;
  expect_shares(frequencies(options, 100), softmax(1, {1}));
}

TEST(Sampler, SameSeedSameTokens) {
  SamplerOptions options;
  options.temperature = 1;
  const auto draw = [&](std::uint64_t seed) {
    options.seed = seed;
    Sampler sampler(options);
    std::vector<int> tokens;
    for (int i = 0; i < 50; ++i) tokens.push_back(sampler.pick(kLogits));
    return tokens;
  };
  EXPECT_EQ(draw(5), draw(5));
  EXPECT_NE(draw(5), draw(6));
}

TEST(Sampler, LogitsFarApartDoNotOverflow) {
  SamplerOptions options;
  options.temperature = 1e-3;
  Sampler sampler(options);
  const std::vector<float> logits = {-1e30f, 1e30f, 0.0f};
  for (int i = 0; i < 10; ++i) EXPECT_EQ(sampler.pick(logits), 1);
}

// NaN has no place in an order: sorting such logits could read past their end.
TEST(Sampler, RefusesLogitsThatCannotBeOrdered) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const SamplerOptions& options :
       {SamplerOptions{}, SamplerOptions{.temperature = 1.0},
        SamplerOptions{.temperature = 1.0, .top_k = 2, .top_p = 0.5}}) {
    Sampler sampler(options);
    const auto refuses = [&](const std::vector<float>& logits, const char* part) {
      EXPECT_THAT([&] { sampler.pick(logits); }, ThrowsMessage<commvq::Error>(HasSubstr(part)));
    };
    refuses({}, "no logits");
    refuses({1, 2, kNan, 3}, "the logit of token 2 is NaN");
    refuses(std::vector<float>(1000, kNan), "the logit of token 0 is NaN");
    refuses({1, kInfinity}, "largest logit is inf");
    refuses({-kInfinity, -kInfinity}, "largest logit is -inf");
    EXPECT_EQ(sampler.pick(std::vector<float>{-kInfinity, 0, -kInfinity}), 1);
  }
}

TEST(SamplerOptions, NamesTheFieldThatIsOutOfRange) {
  const auto refuses = [](auto change, const char* name, const char* value) {
    SamplerOptions options;
    change(options);
    EXPECT_THAT([&] { Sampler{options}; },
                ThrowsMessage<commvq::Error>(AllOf(HasSubstr(name), HasSubstr(value))));
  };
  refuses([](auto& o) { o.temperature = -0.5; }, "temperature", "-0.5");
  refuses([](auto& o) { o.temperature = std::numeric_limits<double>::quiet_NaN(); }, "temperature",
          "nan");
  refuses([](auto& o) { o.top_k = -1; }, "top-k", "-1");
  refuses([](auto& o) { o.top_p = 0; }, "top-p", "0");
  refuses([](auto& o) { o.top_p = 1.5; }, "top-p", "1.5");
}

}  // namespace
}  // namespace engine
