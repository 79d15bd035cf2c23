#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "engine/model.hpp"
#include "engine/sampler.hpp"

namespace engine {

/// Called with each new token; returns false to stop.
using TokenCallback = std::function<bool(int token)>;

/// Runs `prompt` through the model and appends up to `max_tokens` tokens. `cache` must be empty or
/// hold what comes before the prompt; it ends up with everything but the last new token. Stops
/// early after one of `stop_tokens`, which is part of the result. Throws `commvq::Error` for an
/// empty prompt.
std::vector<int> generate(const Model& model, CacheHandle cache, std::span<const int> prompt,
                          int max_tokens, Sampler& sampler, std::span<const int> stop_tokens = {},
                          const TokenCallback& on_token = {});

/// Text that the model writes by itself: goes on with every one of `texts` (which begin with the
/// same number of tokens), side by side, to `length` tokens, sampled at temperature 1, each from a
/// seed of its own. `progress`, if given, receives the tokens written so far of each text.
std::vector<std::vector<int>> write_text(const Model& model, std::vector<std::vector<int>> texts,
                                         int length, std::uint64_t seed,
                                         const std::function<void(int)>& progress = {});

}  // namespace engine
