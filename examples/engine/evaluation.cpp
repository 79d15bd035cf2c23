#include "engine/evaluation.hpp"

#include <algorithm>
#include <cmath>
#include <random>

#include "commvq/core/error.hpp"

#include "engine/generate.hpp"

namespace engine {
namespace {

/// -log softmax(logits)[token].
double negative_log_likelihood(std::span<const float> logits, int token) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - largest);
  return largest + std::log(sum) - logits[static_cast<std::size_t>(token)];
}

/// The names whose codes the project's models learnt to repeat.
constexpr const char* kNames[] = {"Alice", "Boris",  "Clara", "Dmitri", "Elena",  "Farid", "Greta",
                                  "Hugo",  "Irene",  "Jonas", "Karin",  "Leo",    "Mira",  "Nadia",
                                  "Oscar", "Petra",  "Quinn", "Rosa",   "Stefan", "Tara",  "Umar",
                                  "Vera",  "Walter", "Xenia", "Yusuf",  "Zelda"};

}  // namespace

std::vector<std::vector<int>> windows_of(const std::vector<int>& tokens, int context,
                                         int max_windows, const std::vector<int>& prefix) {
  const auto least = static_cast<int>(prefix.size()) + 2;
  commvq::require(context >= least, "the context is ", context, " tokens; it must be at least ",
                  least);
  const std::size_t size = static_cast<std::size_t>(context) - prefix.size();
  commvq::require(tokens.size() >= size, "the text has ", tokens.size(),
                  " tokens; one context needs ", size);
  std::size_t count = tokens.size() / size;
  if (max_windows > 0) count = std::min(count, static_cast<std::size_t>(max_windows));
  std::vector<std::vector<int>> windows(count, prefix);
  for (std::size_t i = 0; i < count; ++i) {
    const auto begin = tokens.begin() + static_cast<std::ptrdiff_t>(i * size);
    windows[i].insert(windows[i].end(), begin, begin + static_cast<std::ptrdiff_t>(size));
  }
  return windows;
}

Predictions predict(const Model& model, CacheHandle cache, std::span<const int> window) {
  Predictions result;
  const auto vocab = static_cast<std::size_t>(model.config().vocab_size);
  const auto chunk = static_cast<std::size_t>(Model::kChunkTokens);
  for (std::size_t first = 0; first < window.size(); first += chunk) {
    const std::size_t count = std::min(chunk, window.size() - first);
    const std::vector<float> logits =
        model.prefill(window.subspan(first, count), cache, Logits::kAll);
    const std::size_t known = std::min(first + count, window.size() - 1) - first;
    const std::size_t offset = result.nll.size();
    result.nll.resize(offset + known);
    result.best.resize(offset + known);
#pragma omp parallel for
    for (std::size_t i = 0; i < known; ++i) {
      const auto row = std::span(logits).subspan(i * vocab, vocab);
      result.nll[offset + i] = negative_log_likelihood(row, window[first + i + 1]);
      result.best[offset + i] = most_probable(row);
    }
  }
  return result;
}

RetrievalCase retrieval_case(const Tokenizer& tokenizer, const std::vector<int>& text, int context,
                             std::uint64_t seed, int index) {
  std::mt19937_64 random(seed * 1000003 + static_cast<std::uint64_t>(index));
  const std::string name = kNames[random() % std::size(kNames)];
  RetrievalCase result;
  for (int i = 0; i < 5; ++i) result.answer += static_cast<char>('0' + random() % 10);
  const auto planted =
      tokenizer.encode(" The secret code of " + name + " is " + result.answer + ".");
  const auto question = tokenizer.encode(" Remember, the secret code of " + name + " is");
  const auto filler = static_cast<std::ptrdiff_t>(context) -
                      static_cast<std::ptrdiff_t>(planted.size() + question.size());
  commvq::require(filler >= 1, "a context of ", context, " tokens has no room for a question");
  commvq::require(static_cast<std::ptrdiff_t>(text.size()) >= filler, "the text has ", text.size(),
                  " tokens; a question needs ", filler);
  const auto first =
      static_cast<std::ptrdiff_t>(random() % (text.size() - static_cast<std::size_t>(filler) + 1));
  const auto depth = static_cast<std::ptrdiff_t>(random() % static_cast<std::uint64_t>(filler));
  const auto begin = text.begin() + first;
  result.prompt.assign(begin, begin + depth);
  result.prompt.insert(result.prompt.end(), planted.begin(), planted.end());
  result.prompt.insert(result.prompt.end(), begin + depth, begin + filler);
  result.prompt.insert(result.prompt.end(), question.begin(), question.end());
  return result;
}

bool retrieves(const Model& model, const Tokenizer& tokenizer, CacheHandle cache,
               const RetrievalCase& question) {
  Sampler greedy{SamplerOptions{}};
  // A digit may be a token of its own, and a space may stand before the first.
  const auto tokens =
      generate(model, cache, question.prompt, static_cast<int>(question.answer.size()) + 1, greedy);
  std::string text = tokenizer.decode(tokens);
  text.erase(0, std::min(text.find_first_not_of(' '), text.size()));
  return text.rfind(question.answer, 0) == 0;
}

}  // namespace engine
