#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "engine/model.hpp"
#include "engine/tokenizer.hpp"

namespace engine {

/// Windows of `context` tokens, at most `max_windows` (0: all): each `prefix` (what a model expects
/// before a text), then tokens of the text, which do not overlap; a shorter rest is left out.
/// Throws `commvq::Error` if the text has not enough tokens for one.
std::vector<std::vector<int>> windows_of(const std::vector<int>& tokens, int context,
                                         int max_windows, const std::vector<int>& prefix = {});

/// What a model said of one window: for each token but the first, the negative log-likelihood and
/// the token it held most probable.
struct Predictions {
  std::vector<double> nll;
  std::vector<int> best;
};

/// Runs a window through `cache`, which must be empty.
Predictions predict(const Model& model, CacheHandle cache, std::span<const int> window);

/// One retrieval question: a fact planted among text, asked for at the end.
struct RetrievalCase {
  std::vector<int> prompt;
  std::string answer;  ///< five digits
};

/// `The secret code of NAME is 12345.` planted at a random depth of `context` tokens of `text`,
/// and `Remember, the secret code of NAME is` at their end. Case `index` of a seed is always the
/// same. Throws `commvq::Error` if the text is shorter than the context.
RetrievalCase retrieval_case(const Tokenizer& tokenizer, const std::vector<int>& text, int context,
                             std::uint64_t seed, int index);

/// True if the model's most probable continuation begins with the answer.
bool retrieves(const Model& model, const Tokenizer& tokenizer, CacheHandle cache,
               const RetrievalCase& question);

}  // namespace engine
