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

/// Mean over the tokens of a window, from `first` on, of the Kullback-Leibler divergence of the
/// next token's distribution with `cache`, which must be empty, from that with an exact one, whose
/// logits of all tokens, `[tokens][vocab_size]`, are given: in nats.
double divergence(const Model& model, CacheHandle cache, std::span<const int> window, Index first,
                  std::span<const float> exact_logits);

/// A text with facts planted in it, and a question for each: every question follows the text, not
/// the other questions, so that the text is read once for all.
struct RetrievalCase {
  struct Question {
    std::vector<int> tokens;
    std::string answer;  ///< five digits
  };
  std::vector<int> text;
  std::vector<Question> questions;
};

/// At most so many facts are planted in one text: each has a name of its own.
inline constexpr int kMaxFacts = 26;

/// `The secret code of NAME is 12345.` planted at `num_facts` random places of a piece of `text`,
/// asked for with `Remember, the secret code of NAME is`; text and longest question are `context`
/// tokens. Case `index` of a seed is always the same. Throws `commvq::Error` if the text is shorter
/// than the context, or the context than the facts.
RetrievalCase retrieval_case(const Tokenizer& tokenizer, const std::vector<int>& text, int context,
                             int num_facts, std::uint64_t seed, int index);

/// For each question 1 if the model's most probable continuation begins with the answer, else 0.
/// `cache` must be empty; it ends up with the text.
std::vector<char> retrieve(const Model& model, const Tokenizer& tokenizer, SequenceCache& cache,
                           const RetrievalCase& asked);

}  // namespace engine
