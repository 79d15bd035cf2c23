// Generation with compressed caches on the model that comes with the project.
#include <algorithm>
#include <cmath>
#include <memory>

#include "commvq/io/codebook_file.hpp"

#include <gmock/gmock.h>

#include "engine/generate.hpp"
#include "engine/tokenizer.hpp"
#include "reference/brief_codecs.hpp"
#include "reference/example_data.hpp"
#include "reference/instrumented.hpp"

namespace engine {
namespace {

using commvq::LayerCodec;
using commvq::testing_support::learn_briefly;
using commvq::testing_support::repeats;
using commvq::testing_support::small_model;
using commvq::testing_support::TemporaryFolder;
using testing::HasSubstr;
using testing::ThrowsMessage;

constexpr const char* kPrompt = "The history of the city begins";

class Generation : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    model_ = std::make_unique<Model>(small_model());
    tokenizer_ = std::make_unique<Tokenizer>(small_model() / "tokenizer.json");
    codecs_ = learn_briefly(*model_);
  }
  static void TearDownTestSuite() {
    codecs_.clear();
    tokenizer_.reset();
    model_.reset();
  }

  static std::vector<int> write(commvq::Cache& cache, int count, double temperature = 0) {
    Sampler sampler({.temperature = temperature, .seed = 3});
    return generate(*model_, cache, tokenizer_->encode(kPrompt), count, sampler);
  }

  static std::unique_ptr<Model> model_;
  static std::unique_ptr<Tokenizer> tokenizer_;
  static std::vector<LayerCodec> codecs_;
};

std::unique_ptr<Model> Generation::model_;
std::unique_ptr<Tokenizer> Generation::tokenizer_;
std::vector<LayerCodec> Generation::codecs_;

/// Feeds `tokens` to an empty cache in chunks of `chunk` and returns all logits.
std::vector<float> recompute(const Model& model, commvq::Cache& cache, std::span<const int> tokens,
                             std::size_t chunk) {
  std::vector<float> logits;
  for (std::size_t first = 0; first < tokens.size(); first += chunk) {
    const auto part = tokens.subspan(first, std::min(chunk, tokens.size() - first));
    const Segment segment{part, &cache};
    const std::vector<float> rows = model.forward({&segment, 1}, Logits::kAll);
    logits.insert(logits.end(), rows.begin(), rows.end());
  }
  return logits;
}

/// How far below the largest logit of its row the token lies.
double deficit(std::span<const float> logits, int token) {
  return *std::max_element(logits.begin(), logits.end()) - logits[static_cast<std::size_t>(token)];
}

TEST_F(Generation, TwoThousandTokensEqualTheSameRunFromScratch) {
  constexpr int kTokens = repeats(2000, 150);
  commvq::Cache cache = model_->make_cache(codecs_);
  const std::vector<int> written = write(cache, kTokens);
  ASSERT_EQ(written.size(), std::size_t{kTokens});
  const std::vector<int> prompt = tokenizer_->encode(kPrompt);
  std::vector<int> all = prompt;
  all.insert(all.end(), written.begin(), written.end() - 1);
  EXPECT_EQ(cache.length(), static_cast<Index>(all.size()));
  EXPECT_GE(cache.layer(0).coded_end(), cache.length() - 128);

  const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
  for (const std::size_t chunk : {std::size_t{256}, std::size_t{37}}) {
    commvq::Cache fresh = model_->make_cache(codecs_);
    const std::vector<float> logits = recompute(*model_, fresh, all, chunk);
    // Sums of matrix products are made in another order, which moves logits a little, and once in
    // a while a code: the token written has the largest logit to within that.
    int same = 0;
    for (std::size_t i = 0; i < written.size(); ++i) {
      const auto row = std::span(logits).subspan((prompt.size() - 1 + i) * vocab, vocab);
      same += most_probable(row) == written[i];
      EXPECT_LE(deficit(row, written[i]), 0.25) << "token " << i << ", chunks of " << chunk;
    }
    EXPECT_GE(same, kTokens - kTokens / 100) << "chunks of " << chunk;
  }
}

TEST_F(Generation, EveryWindowAndEverySideEqualsTheSameRunFromScratch) {
  std::vector<LayerCodec> keys_alone = codecs_, values_alone = codecs_;
  for (LayerCodec& codec : keys_alone) codec.values = nullptr;
  for (LayerCodec& codec : values_alone) codec.keys = nullptr;
  const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
  for (const auto& codecs : {codecs_, keys_alone, values_alone, std::vector<LayerCodec>{}})
    for (const Index window : {1, 16, 200}) {
      if (window != 16 && repeats(2, 1) == 1) continue;
      commvq::Cache cache = model_->make_cache(codecs, window, 2);
      std::vector<int> all = tokenizer_->encode(kPrompt);
      const std::size_t first = all.size() - 1;
      const std::vector<int> written = write(cache, repeats(150, 24));
      all.insert(all.end(), written.begin(), written.end() - 1);
      commvq::Cache fresh = model_->make_cache(codecs, window, 2);
      const std::vector<float> logits = recompute(*model_, fresh, all, 64);
      for (std::size_t i = 0; i < written.size(); ++i)
        EXPECT_LE(deficit(std::span(logits).subspan((first + i) * vocab, vocab), written[i]), 0.25)
            << "token " << i << ", window " << window;
    }
}

TEST_F(Generation, GoesOnAfterAForkAndATruncation) {
  commvq::Cache cache = model_->make_cache(codecs_, 32);
  const std::vector<int> written = write(cache, repeats(100, 50));
  commvq::Cache branch = cache.fork();
  branch.truncate(cache.length() - 20);
  std::vector<int> rest(written.end() - 21, written.end() - 1);
  Sampler greedy{SamplerOptions{}};
  const std::vector<int> again = generate(*model_, branch, rest, 30, greedy);
  rest = {written.back()};
  EXPECT_EQ(again.front(), written.back());
  const std::vector<int> onward = generate(*model_, cache, rest, 29, greedy);
  EXPECT_TRUE(std::equal(onward.begin(), onward.end(), again.begin() + 1));
}

TEST_F(Generation, SavedCodebooksWriteTheSameText) {
  const TemporaryFolder folder("generation");
  commvq::ModelCodecs saved;
  saved.rope = model_->config().rope;
  saved.num_kv_heads = model_->config().num_kv_heads;
  saved.model_digest = model_->digest();
  saved.layers = codecs_;
  commvq::save_codecs(folder.path() / "codebooks.safetensors", saved);
  const auto loaded = commvq::load_codecs(folder.path() / "codebooks.safetensors");
  EXPECT_NO_THROW(loaded.require_model(model_->config().rope, model_->config().num_kv_heads,
                                       model_->config().num_layers, model_->digest()));
  commvq::Cache from_memory = model_->make_cache(codecs_, 16);
  commvq::Cache from_file = model_->make_cache(loaded.layers, 16);
  constexpr int kTokens = repeats(200, 30);
  EXPECT_EQ(write(from_memory, kTokens, 0.8), write(from_file, kTokens, 0.8));
}

TEST_F(Generation, CodebooksOfAnotherModelAreRefused) {
  commvq::ModelCodecs codecs;
  codecs.rope = model_->config().rope;
  codecs.num_kv_heads = model_->config().num_kv_heads;
  codecs.model_digest = model_->digest();
  codecs.layers = codecs_;
  const auto error_for = [&](const std::string& from, const std::string& to) -> std::string {
    const TemporaryFolder folder("other_model");
    std::string config = commvq::testing_support::read_file(small_model() / "config.json");
    config.replace(config.find(from), from.size(), to);
    commvq::testing_support::write_file(folder.path() / "config.json", config);
    std::filesystem::create_symlink(small_model() / "model.safetensors",
                                    folder.path() / "model.safetensors");
    const Model other(folder.path());
    try {
      codecs.require_model(other.config().rope, other.config().num_kv_heads,
                           other.config().num_layers, other.digest());
    } catch (const commvq::Error& error) {
      return error.what();
    }
    return "(no error)";
  };
  EXPECT_EQ(error_for("4096", "4096"), "(no error)");
  EXPECT_THAT(error_for("4096", "8192"), HasSubstr(model_->digest()));
  EXPECT_THAT(error_for("10000.0", "20000.0"), HasSubstr("20000"));
  EXPECT_THAT(
      [&] {
        codecs.require_model(model_->config().rope, model_->config().num_kv_heads, 5,
                             model_->digest());
      },
      ThrowsMessage<commvq::Error>(HasSubstr("5")));
}

TEST_F(Generation, StopsWhereItIsTold) {
  commvq::Cache cache = model_->make_cache({});
  const std::vector<int> written = write(cache, 30);
  ASSERT_EQ(written.size(), 30u);
  EXPECT_EQ(cache.length(), static_cast<Index>(tokenizer_->encode(kPrompt).size()) + 29);

  const std::vector<int> prompt = tokenizer_->encode(kPrompt);
  const int stop = written[10];
  const auto first = std::find(written.begin(), written.end(), stop);
  Sampler greedy{SamplerOptions{}};
  cache.clear();
  EXPECT_EQ(generate(*model_, cache, prompt, 30, greedy, {{stop}}),
            std::vector<int>(written.begin(), first + 1));
  cache.clear();
  int calls = 0;
  const auto five =
      generate(*model_, cache, prompt, 30, greedy, {}, [&](int) { return ++calls < 5; });
  EXPECT_EQ(five, std::vector<int>(written.begin(), written.begin() + 5));
  EXPECT_TRUE(generate(*model_, cache, prompt, 0, greedy).empty());
  EXPECT_THAT([&] { generate(*model_, cache, {}, 1, greedy); },
              ThrowsMessage<commvq::Error>(HasSubstr("prompt has no tokens")));
}

TEST_F(Generation, TextsSideBySideAreThoseWrittenAlone) {
  constexpr int kTokens = repeats(40, 15);
  const auto together = write_text(*model_, {{0, 10}, {0, 20}, {0, 30}}, kTokens, 7);
  ASSERT_EQ(together.size(), 3u);
  EXPECT_EQ(together[0], write_text(*model_, {{0, 10}}, kTokens, 7)[0]);
  EXPECT_EQ(together[2].size(), std::size_t{kTokens});
  EXPECT_NE(together[1], together[2]);
  EXPECT_THROW(write_text(*model_, {{0}, {0, 1}}, 40, 7), commvq::Error);
  EXPECT_THROW(write_text(*model_, {}, 40, 7), commvq::Error);
}

}  // namespace
}  // namespace engine
