#include "engine/evaluation.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>

#include "commvq/core/error.hpp"

#include <Eigen/Core>

#include "engine/generate.hpp"

namespace engine {
namespace {

double log_sum_exp(std::span<const float> logits) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - largest);
  return largest + std::log(sum);
}

/// -log softmax(logits)[token].
double negative_log_likelihood(std::span<const float> logits, int token) {
  return log_sum_exp(logits) - logits[static_cast<std::size_t>(token)];
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

double divergence(const Model& model, CacheHandle cache, std::span<const int> window, Index first,
                  std::span<const float> exact_logits) {
  const Index vocab = model.config().vocab_size, chunk = Model::kChunkTokens;
  const auto tokens = static_cast<Index>(window.size());
  const auto log_probabilities = [&](const float* logits) -> Eigen::ArrayXd {
    return Eigen::Map<const Eigen::ArrayXf>(logits, vocab).cast<double>() -
           log_sum_exp({logits, static_cast<std::size_t>(vocab)});
  };
  double sum = 0;
  for (Index begin = 0; begin < tokens; begin += chunk) {
    const Index count = std::min(chunk, tokens - begin);
    const std::vector<float> logits = model.prefill(
        window.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(count)), cache,
        Logits::kAll);
    for (Index t = std::max(begin, first); t < begin + count; ++t) {
      const Eigen::ArrayXd exact = log_probabilities(exact_logits.data() + t * vocab);
      const Eigen::ArrayXd coded = log_probabilities(logits.data() + (t - begin) * vocab);
      sum += (exact.exp() * (exact - coded)).sum();
    }
  }
  return sum / static_cast<double>(tokens - first);
}

RetrievalCase retrieval_case(const Tokenizer& tokenizer, const std::vector<int>& text, int context,
                             int num_facts, std::uint64_t seed, int index) {
  static_assert(std::size(kNames) == kMaxFacts);
  commvq::require(num_facts >= 1 && num_facts <= kMaxFacts, "there are ", num_facts,
                  " facts to plant; a text holds 1 to ", kMaxFacts);
  std::mt19937_64 random(seed * 1000003 + static_cast<std::uint64_t>(index));
  const auto below = [&](std::size_t limit) { return static_cast<std::size_t>(random() % limit); };
  std::vector<std::string> names(std::begin(kNames), std::end(kNames));
  RetrievalCase result;
  std::vector<std::vector<int>> facts;
  std::size_t num_planted = 0, longest = 0;
  for (int i = 0; i < num_facts; ++i) {
    const std::size_t chosen = below(names.size());
    const std::string name = names[chosen];
    names.erase(names.begin() + static_cast<std::ptrdiff_t>(chosen));
    std::string answer;
    for (int digit = 0; digit < 5; ++digit) answer += static_cast<char>('0' + random() % 10);
    facts.push_back(tokenizer.encode(" The secret code of " + name + " is " + answer + "."));
    num_planted += facts.back().size();
    result.questions.push_back(
        {tokenizer.encode(" Remember, the secret code of " + name + " is"), answer});
    longest = std::max(longest, result.questions.back().tokens.size());
  }
  const std::size_t needed = num_planted + longest;
  commvq::require(static_cast<std::size_t>(context) > needed, "a context of ", context,
                  " tokens has no room for ", num_facts, " facts and a question");
  const std::size_t filler = static_cast<std::size_t>(context) - needed;
  commvq::require(text.size() >= filler, "the text has ", text.size(), " tokens; a question needs ",
                  filler);
  const auto begin = text.begin() + static_cast<std::ptrdiff_t>(below(text.size() - filler + 1));
  std::vector<std::size_t> depths;
  for (int i = 0; i < num_facts; ++i) depths.push_back(below(filler));
  std::sort(depths.begin(), depths.end());
  std::size_t done = 0;
  for (std::size_t i = 0; i <= depths.size(); ++i) {
    const std::size_t depth = i < depths.size() ? depths[i] : filler;
    result.text.insert(result.text.end(), begin + static_cast<std::ptrdiff_t>(done),
                       begin + static_cast<std::ptrdiff_t>(depth));
    if (i < facts.size()) result.text.insert(result.text.end(), facts[i].begin(), facts[i].end());
    done = depth;
  }
  return result;
}

std::vector<char> retrieve(const Model& model, const Tokenizer& tokenizer, SequenceCache& cache,
                           const RetrievalCase& asked) {
  model.prefill(asked.text, cache, Logits::kNone);
  std::vector<char> right;
  for (const RetrievalCase::Question& question : asked.questions) {
    const std::unique_ptr<SequenceCache> fork = cache.fork();
    Sampler greedy{SamplerOptions{}};
    // A digit may be a token of its own, and a space may stand before the first.
    const auto tokens = generate(model, *fork, question.tokens,
                                 static_cast<int>(question.answer.size()) + 1, greedy);
    std::string text = tokenizer.decode(tokens);
    text.erase(0, std::min(text.find_first_not_of(' '), text.size()));
    right.push_back(text.rfind(question.answer, 0) == 0 ? 1 : 0);
  }
  return right;
}

}  // namespace engine
