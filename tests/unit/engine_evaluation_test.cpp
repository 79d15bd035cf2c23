#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include <gmock/gmock.h>

#include "engine/cache_method.hpp"
#include "engine/cache_results.hpp"
#include "engine/evaluation.hpp"
#include "engine/generate.hpp"
#include "engine/logit_error.hpp"
#include "engine/parallel.hpp"
#include "engine/text_file.hpp"
#include "reference/example_data.hpp"
#include "reference/instrumented.hpp"

namespace engine {
namespace {

using commvq::testing_support::repeats;
using commvq::testing_support::shared_data;
using commvq::testing_support::small_model;
using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

std::vector<int> counting(int count) {
  std::vector<int> tokens(static_cast<std::size_t>(count));
  std::iota(tokens.begin(), tokens.end(), 0);
  return tokens;
}

TEST(WindowsOf, CutsWholeWindowsAndLeavesTheRest) {
  EXPECT_EQ(windows_of(counting(10), 3, 0),
            (std::vector<std::vector<int>>{{0, 1, 2}, {3, 4, 5}, {6, 7, 8}}));
  EXPECT_EQ(windows_of(counting(10), 5, 1), (std::vector<std::vector<int>>{{0, 1, 2, 3, 4}}));
  EXPECT_EQ(windows_of(counting(10), 5, 0, {7}),
            (std::vector<std::vector<int>>{{7, 0, 1, 2, 3}, {7, 4, 5, 6, 7}}));
  EXPECT_THAT([] { windows_of(counting(10), 11, 0); },
              ThrowsMessage<commvq::Error>(AllOf(HasSubstr("10 tokens"), HasSubstr("11"))));
  EXPECT_THROW(windows_of(counting(10), 1, 0), commvq::Error);
  EXPECT_THROW(windows_of(counting(10), 2, 0, {7}), commvq::Error);
}

TEST(Predict, IsTheNegativeLogLikelihoodOfEachNextToken) {
  const Model model(small_model());
  const std::vector<int> tokens =
      Tokenizer(small_model() / "tokenizer.json")
          .encode("It was the best of times, it was the worst of times.");
  commvq::Cache cache = model.make_cache({}), other = model.make_cache({});
  const Predictions predictions = predict(model, cache, tokens);
  ASSERT_EQ(predictions.nll.size(), tokens.size() - 1);
  const std::vector<float> logits = model.prefill(tokens, other, Logits::kAll);
  const auto vocab = static_cast<std::size_t>(model.config().vocab_size);
  for (std::size_t t = 0; t + 1 < tokens.size(); ++t) {
    const auto row = std::span(logits).subspan(t * vocab, vocab);
    double sum = 0;
    for (const float logit : row) sum += std::exp(double(logit));
    EXPECT_NEAR(predictions.nll[t],
                std::log(sum) - double(row[static_cast<std::size_t>(tokens[t + 1])]), 1e-3);
    EXPECT_EQ(predictions.best[t], most_probable(row));
  }
}

TEST(Divergence, IsZeroWithAnExactCacheAndGrowsWithTheWindowThatIsCoded) {
  const Model model(small_model());
  const std::vector<int> window = counting(80);
  commvq::Cache first = model.make_cache({}), second = model.make_cache({});
  const std::vector<float> logits = model.prefill(window, first, Logits::kAll);
  EXPECT_EQ(divergence(model, second, window, 10, logits), 0);
  std::vector<float> other = logits;
  const auto vocab = static_cast<std::size_t>(model.config().vocab_size);
  for (std::size_t i = 0; i < other.size(); i += vocab) other[i] += 5;
  commvq::Cache third = model.make_cache({});
  EXPECT_GT(divergence(model, third, window, 10, other), 0);
}

TEST(Retrieval, PlantsFactsAndAsksForEach) {
  const Tokenizer tokenizer(small_model() / "tokenizer.json");
  const std::vector<int> text = tokenizer.encode(std::string(3000, '.'));
  std::set<std::string> all_names;
  for (int i = 0; i < 60; ++i) {
    const RetrievalCase asked = retrieval_case(tokenizer, text, 120, 4, 5, i);
    const std::string planted = tokenizer.decode(asked.text);
    std::set<std::string> names;
    std::size_t longest = 0;
    ASSERT_EQ(asked.questions.size(), 4u);
    for (const RetrievalCase::Question& question : asked.questions) {
      longest = std::max(longest, question.tokens.size());
      const std::string words = tokenizer.decode(question.tokens);
      const std::string ask = " Remember, the secret code of ";
      ASSERT_EQ(words.rfind(ask, 0), 0u);
      const std::string name = words.substr(ask.size(), words.rfind(" is") - ask.size());
      EXPECT_EQ(words, ask + name + " is");
      EXPECT_EQ(question.answer.size(), 5u);
      EXPECT_NE(planted.find(" The secret code of " + name + " is " + question.answer + "."),
                std::string::npos);
      names.insert(name);
    }
    EXPECT_EQ(asked.text.size() + longest, 120u);
    EXPECT_EQ(names.size(), 4u);
    all_names.merge(names);
    EXPECT_EQ(retrieval_case(tokenizer, text, 120, 4, 5, i).text, asked.text);
  }
  EXPECT_EQ(all_names.size(), static_cast<std::size_t>(kMaxFacts));
  EXPECT_THROW(retrieval_case(tokenizer, text, 10, 1, 5, 0), commvq::Error);
  EXPECT_THROW(retrieval_case(tokenizer, {1, 2, 3}, 60, 1, 5, 0), commvq::Error);
  EXPECT_THROW(retrieval_case(tokenizer, text, 1000, kMaxFacts + 1, 5, 0), commvq::Error);
}

TEST(Retrieval, TheShippedModelAnswersWithAnExactCache) {
  const Model model(small_model());
  const Tokenizer tokenizer(small_model() / "tokenizer.json");
  constexpr int kCases = repeats(10, 2), kContext = repeats(512, 96);
  const std::vector<int> text = write_text(model, {{0}}, kContext + 88, 1)[0];
  const CacheMethod exact = codec_method("exact", model, {}, 128, 0);
  const auto cache = exact.new_cache();
  const std::vector<char> right =
      retrieve(model, tokenizer, *cache, retrieval_case(tokenizer, text, kContext, kCases, 2, 0));
  EXPECT_GE(std::count(right.begin(), right.end(), 1), kCases - 2);
}

TEST(LogitProbe, MeasuresWhatARoundTripDoesToTheLogits) {
  const Model model(small_model());
  const std::vector<int> text = counting(150);
  const LogitProbe probe(model, text, 4);
  const commvq::Rope rope(model.config().rope);
  const auto layers = [&](float factor) {
    return std::vector<KeyRoundTrip>(6, [&rope, factor](MatrixView<float> keys) {
      for (Index i = 0; i < keys.rows * keys.cols; ++i) keys.data[i] *= factor;
      rope.apply(keys, 0);
    });
  };
  EXPECT_EQ(probe.error_of(layers(1), 128).squared_error, 0);
  const LogitError once = probe.error_of(layers(1.25f), 128);
  const LogitError twice = probe.error_of(layers(1.5f), 128);
  // Queries at 146 to 149 see 19 to 22 keys beyond the window; 6 layers, 4 heads.
  EXPECT_EQ(once.count, 6 * 4 * (19 + 20 + 21 + 22));
  EXPECT_GT(once.rms(), 0);
  EXPECT_NEAR(twice.rms() / once.rms(), 2, 1e-3);
  EXPECT_EQ(once.squared_logits, twice.squared_logits);
  std::vector<KeyRoundTrip> one_layer(6);
  one_layer[2] = layers(1.25f)[2];
  EXPECT_EQ(probe.error_of(one_layer, 128).count, once.count / 6);
}

TEST(CacheResults, ComeBackForTheSameKeyAlone) {
  const commvq::testing_support::TemporaryFolder folder("cache_results");
  const auto path = folder.path() / "exact.json";
  EXPECT_FALSE(load_results(path, "a").has_value());
  const CacheResults results{{{{0.1, 1e-17}, {3, 4}}, {{2.5}, {5}}}, {1, 0, 1}, 77};
  save_results(path, "a", results);
  const auto loaded = load_results(path, "a");
  ASSERT_TRUE(loaded.has_value());
  ASSERT_EQ(loaded->predictions.size(), 2u);
  EXPECT_EQ(loaded->predictions[0].nll, results.predictions[0].nll);
  EXPECT_EQ(loaded->predictions[1].best, results.predictions[1].best);
  EXPECT_EQ(loaded->retrieved, results.retrieved);
  EXPECT_EQ(loaded->allocated_bytes, 77);
  EXPECT_FALSE(load_results(path, "b").has_value());
  commvq::testing_support::write_file(path, "{}");
  EXPECT_THAT([&] { load_results(path, "a"); },
              ThrowsMessage<commvq::Error>(HasSubstr("exact.json")));
}

TEST(ForEachTask, RunsEachOnceAndPassesErrorsOn) {
  for (const Index count : {Index{0}, Index{1}, Index{50}}) {
    std::vector<int> runs(static_cast<std::size_t>(count));
    for_each_task(count, [&](Index i) { ++runs[static_cast<std::size_t>(i)]; });
    EXPECT_EQ(runs, std::vector<int>(static_cast<std::size_t>(count), 1));
  }
  EXPECT_THAT([] { for_each_task(9, [](Index i) { commvq::require(i != 4, "task ", i); }); },
              ThrowsMessage<commvq::Error>(HasSubstr("task 4")));
}

// Perplexity of the larger model over books is about 26 at this context length.
TEST(Perplexity, OfTheLargerModelIsThatOfItsTraining) {
  if (COMMVQ_INSTRUMENTED != 0) GTEST_SKIP() << "takes long, and runs what other tests run";
  const std::filesystem::path folder = shared_data() / "models" / "lm-29m";
  const std::filesystem::path text = shared_data() / "text" / "validation.txt";
  if (!std::filesystem::exists(folder) || !std::filesystem::exists(text))
    GTEST_SKIP() << "no " << folder << " or no " << text;
  const Model model(folder);
  const Tokenizer tokenizer(folder / "tokenizer.json");
  const auto windows = windows_of(tokenizer.encode(read_text_file(text)), 1024, 4);
  double nll = 0, count = 0;
  for (const auto& window : windows) {
    commvq::Cache cache = model.make_cache({});
    const Predictions predictions = predict(model, cache, window);
    nll += std::accumulate(predictions.nll.begin(), predictions.nll.end(), 0.0);
    count += double(predictions.nll.size());
  }
  EXPECT_GT(std::exp(nll / count), 15);
  EXPECT_LT(std::exp(nll / count), 40);
}

}  // namespace
}  // namespace engine
