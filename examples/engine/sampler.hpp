#pragma once

#include <cstdint>
#include <random>
#include <span>

namespace engine {

struct SamplerOptions {
  double temperature = 0.0;  ///< 0 takes the most probable token
  int top_k = 0;             ///< keep the most probable so many; 0 keeps all
  double top_p = 1.0;        ///< keep the most probable tokens whose sum reaches this, in (0, 1]
  std::uint64_t seed = 1;

  /// Throws `commvq::Error` naming the first field that is out of range.
  void validate() const;
};

/// Picks tokens from logits; the same seed and logits give the same tokens.
class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options);
  /// Throws `commvq::Error` for no logits, NaN, and where the largest is infinite; minus infinity
  /// rules a token out.
  int pick(std::span<const float> logits);

 private:
  SamplerOptions options_;
  std::mt19937_64 random_;
};

/// The index of the largest logit; the first of equals.
int most_probable(std::span<const float> logits);

}  // namespace engine
