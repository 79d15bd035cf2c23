#include "engine/sampler.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "commvq/core/error.hpp"

namespace engine {
namespace {

/// Throws unless the logits can be ordered, and one of them is above all weights of zero.
void check(std::span<const float> logits) {
  commvq::require(!logits.empty(), "there are no logits to pick a token from");
  float largest = -std::numeric_limits<float>::infinity();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    commvq::require(!std::isnan(logits[i]), "the logit of token ", i,
                    " is NaN: the model's numbers have overflowed");
    largest = std::max(largest, logits[i]);
  }
  commvq::require(std::isfinite(largest), "the largest logit is ", largest, "; it must be finite");
}

}  // namespace

void SamplerOptions::validate() const {
  commvq::require(std::isfinite(temperature) && temperature >= 0, "temperature is ", temperature,
                  "; it must be at least 0");
  commvq::require(top_k >= 0, "top-k is ", top_k, "; it must be at least 0");
  commvq::require(top_p > 0 && top_p <= 1, "top-p is ", top_p, "; it must be in (0, 1]");
}

Sampler::Sampler(const SamplerOptions& options) : options_(options), random_(options.seed) {
  options_.validate();
}

int Sampler::pick(std::span<const float> logits) {
  check(logits);
  if (options_.temperature == 0) return most_probable(logits);
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  if (options_.top_k > 0 || options_.top_p < 1)
    std::sort(order.begin(), order.end(),
              [&](int a, int b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  if (options_.top_k > 0 && order.size() > static_cast<std::size_t>(options_.top_k))
    order.resize(static_cast<std::size_t>(options_.top_k));

  const float largest = *std::max_element(logits.begin(), logits.end());
  std::vector<double> weights;
  weights.reserve(order.size());
  for (const int token : order)
    weights.push_back(std::exp((logits[token] - largest) / options_.temperature));
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  double kept = 0;
  std::size_t count = 0;
  while (count < weights.size() && kept < options_.top_p * total) kept += weights[count++];

  double left = kept * (static_cast<double>(random_() >> 11) * 0x1p-53);
  for (std::size_t i = 0; i + 1 < count; ++i) {
    left -= weights[i];
    if (left < 0) return order[i];
  }
  return order[count - 1];
}

int most_probable(std::span<const float> logits) {
  return static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

}  // namespace engine
