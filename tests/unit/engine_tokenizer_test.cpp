#include <functional>
#include <random>

#include "commvq/core/error.hpp"

#include <gmock/gmock.h>
#include <nlohmann/json.hpp>

#include "engine/tokenizer.hpp"
#include "reference/example_data.hpp"
#include "reference/instrumented.hpp"

namespace engine {
namespace {

using commvq::testing_support::read_file;
using commvq::testing_support::repeats;
using commvq::testing_support::small_model;
using commvq::testing_support::TemporaryFolder;
using commvq::testing_support::test_data;
using commvq::testing_support::write_file;
using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

std::filesystem::path shipped() {
  return small_model() / "tokenizer.json";
}

Tokenizer changed(json file, const std::function<void(json&)>& change) {
  const TemporaryFolder folder("tokenizer");
  change(file);
  write_file(folder.path() / "tokenizer.json", file.dump());
  return Tokenizer(folder.path() / "tokenizer.json");
}

/// The shipped tokenizer after a change to its JSON.
Tokenizer changed(const std::function<void(json&)>& change) {
  return changed(json::parse(read_file(shipped())), change);
}

/// The shipped file with its first 255 merges alone, which is read sooner.
const json& brief_file() {
  static const json brief = [] {
    json file = json::parse(read_file(shipped()));
    json& model = file["model"];
    model["merges"].erase(model["merges"].begin() + 255, model["merges"].end());
    json vocab = json::object();
    for (const auto& [token, id] : model["vocab"].items())
      if (id < 512) vocab[token] = id;
    model["vocab"] = std::move(vocab);
    return file;
  }();
  return brief;
}

/// What refusing the brief file says after a change; "(no error)" if it loads.
std::string error_after(const std::function<void(json&)>& change) {
  try {
    changed(brief_file(), change);
    return "(no error)";
  } catch (const commvq::Error& error) {
    return error.what();
  }
}

std::string utf8(char32_t c) {
  const auto byte = [](char32_t bits) {
    return static_cast<char>(static_cast<unsigned char>(bits));
  };
  if (c < 0x80) return {byte(c)};
  if (c < 0x800) return {byte(0xc0 | c >> 6), byte(0x80 | (c & 0x3f))};
  if (c < 0x10000)
    return {byte(0xe0 | c >> 12), byte(0x80 | (c >> 6 & 0x3f)), byte(0x80 | (c & 0x3f))};
  return {byte(0xf0 | c >> 18), byte(0x80 | (c >> 12 & 0x3f)), byte(0x80 | (c >> 6 & 0x3f)),
          byte(0x80 | (c & 0x3f))};
}

/// Characters of every length in UTF-8, many of them ASCII.
std::string random_text(std::mt19937_64& random, int characters) {
  std::string text;
  while (characters > 0) {
    const char32_t limits[] = {0x80, 0x80, 0x800, 0x10000, 0x110000};
    const auto c = static_cast<char32_t>(random() % limits[random() % 5]);
    if (c >= 0xd800 && c < 0xe000) continue;  // surrogates are no characters
    text += utf8(c);
    --characters;
  }
  return text;
}

// The table was written by the tokenizers package; see tests/data/make_tokenizer_cases.py.
TEST(Tokenizer, GivesTheIdsOfTheTokenizersPackage) {
  const json table = json::parse(read_file(test_data() / "tokenizer_cases.json"));
  ASSERT_EQ(table.size(), 5u);
  for (const json& variant : table) {
    SCOPED_TRACE(variant["name"].get<std::string>());
    const Tokenizer tokenizer = changed([&](json& file) {
      const json& changes = variant["changes"];
      if (changes.contains("pre_tokenizer")) file["pre_tokenizer"] = changes["pre_tokenizer"];
      file["model"]["ignore_merges"] = changes.value("ignore_merges", false);
    });
    ASSERT_EQ(variant["cases"].size(), 27u);
    for (const json& example : variant["cases"]) {
      const auto text = example["text"].get<std::string>();
      EXPECT_EQ(tokenizer.encode(text), example["ids"].get<std::vector<int>>()) << text;
    }
  }
}

TEST(Tokenizer, AnyUtf8SurvivesTheRoundTrip) {
  const Tokenizer tokenizer(shipped());
  std::mt19937_64 random(1);
  for (int repeat = 0; repeat < repeats(300, 60); ++repeat) {
    const std::string text = random_text(random, static_cast<int>(random() % 200));
    ASSERT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
  }
}

TEST(Tokenizer, EveryTokenDecodesAndOthersAreRefused) {
  const Tokenizer tokenizer(shipped());
  EXPECT_EQ(tokenizer.vocab_size(), 8192);
  for (int token = 0; token < tokenizer.vocab_size(); ++token)
    EXPECT_FALSE(tokenizer.decode({token}).empty()) << token;
  for (const int token : {-1, 8192, 1 << 30})
    EXPECT_THAT([&] { tokenizer.decode({token}); },
                ThrowsMessage<commvq::Error>(
                    AllOf(HasSubstr(std::to_string(token)), HasSubstr("vocabulary of 8192"))));
}

TEST(Tokenizer, AddedTokensAreFoundInTheText) {
  const Tokenizer tokenizer(shipped());
  EXPECT_EQ(tokenizer.added_token("<|endoftext|>"), 0);
  EXPECT_EQ(tokenizer.added_token("<|pad|>"), -1);
  EXPECT_EQ(tokenizer.encode("<|endoftext|>"), std::vector<int>{0});
  const Tokenizer longest = changed([](json& file) {
    for (const auto& [content, id] : {std::pair("<|end", 8192), std::pair("<|endoftext|>!", 8193)})
      file["added_tokens"].push_back({{"id", id}, {"content", content}});
  });
  EXPECT_EQ(longest.encode("<|endoftext|>!"), std::vector<int>{8193});
  EXPECT_EQ(longest.encode("<|end<|endoftext|>"), (std::vector<int>{8192, 0}));
}

TEST(Tokenizer, DigitsAreTokensOfTheirOwn) {
  const Tokenizer tokenizer(shipped());
  EXPECT_EQ(tokenizer.encode("12345").size(), 5u);
}

TEST(Tokenizer, RefusesTextThatIsNotUtf8) {
  const Tokenizer tokenizer(shipped());
  for (const char* text : {"\xff", "ab\xc3", "\xc0\x80", "\xed\xa0\x80", "\xf5\x80\x80\x80"})
    EXPECT_THAT([&] { tokenizer.encode(text); },
                ThrowsMessage<commvq::Error>(HasSubstr("UTF-8 error")));
}

TEST(Tokenizer, RefusesStepsThatItDoesNotCompute) {
  EXPECT_EQ(error_after([](json&) {}), "(no error)");
  EXPECT_THAT(error_after([](json& f) { f["model"]["type"] = "Unigram"; }),
              AllOf(HasSubstr("Unigram"), HasSubstr("only BPE")));
  EXPECT_THAT(error_after([](json& f) {
                f["normalizer"] = {{"type", "Lowercase"}};
              }),
              HasSubstr("normalizer \"Lowercase\" is not supported"));
  EXPECT_THAT(error_after([](json& f) { f["model"]["byte_fallback"] = true; }),
              HasSubstr("byte_fallback of a byte-level vocabulary"));
  EXPECT_THAT(error_after([](json& f) { f["model"]["dropout"] = 0.1; }),
              HasSubstr("dropout is 0.1"));
  EXPECT_THAT(error_after([](json& f) { f["model"]["end_of_word_suffix"] = "</w>"; }),
              HasSubstr("end_of_word_suffix is \"</w>\""));
  EXPECT_THAT(error_after([](json& f) {
                f["pre_tokenizer"] = {{"type", "Whitespace"}};
              }),
              HasSubstr("pre-tokenizer \"Whitespace\" is not supported"));
  EXPECT_THAT(error_after([](json& f) {
                f["decoder"] = {{"type", "WordPiece"}};
              }),
              HasSubstr("decoder \"WordPiece\" is not supported"));
  EXPECT_THAT(error_after([](json& f) {
                f["post_processor"] = {{"type", "BertProcessing"}};
              }),
              HasSubstr("post-processor \"BertProcessing\" is not supported"));
  EXPECT_THAT(error_after([](json& f) { f["added_tokens"][0]["lstrip"] = true; }),
              AllOf(HasSubstr("<|endoftext|>"), HasSubstr("lstrip")));
  EXPECT_THAT(error_after([](json& f) { f["model"]["unk_token"] = "<none>"; }),
              HasSubstr("unk_token \"<none>\" is not in vocab"));
  EXPECT_THAT(
      error_after([](json& f) { f["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"; }),
      HasSubstr("\"Removed\""));
  EXPECT_THAT(
      error_after([](json& f) { f["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = true; }),
      HasSubstr("more than one splitting step"));
}

TEST(Tokenizer, RefusesFilesThatLie) {
  EXPECT_THAT(error_after([](json& f) { f = json::array(); }), HasSubstr("not a JSON object"));
  EXPECT_THAT(error_after([](json& f) { f.erase("model"); }), HasSubstr("no field model"));
  EXPECT_THAT(error_after([](json& f) { f["model"]["vocab"] = json::object(); }),
              HasSubstr("vocab is empty"));
  EXPECT_THAT(error_after([](json& f) { f["model"]["vocab"].erase("a"); }),
              HasSubstr("no token for byte 97"));
  EXPECT_THAT(error_after([](json& f) { f["model"]["vocab"]["a"] = -3; }), HasSubstr("-3"));
  EXPECT_THAT(error_after([](json& f) { f["model"]["vocab"]["a"] = "one"; }), HasSubstr("\"one\""));
  EXPECT_THAT(error_after([](json& f) { f["model"]["vocab"]["\u4e00"] = 5; }),
              HasSubstr("not written in byte-level characters"));
  EXPECT_THAT(error_after([](json& f) {
                f["model"]["merges"].push_back({"qq", "zz"});
              }),
              HasSubstr("not in vocab"));
  EXPECT_THAT(error_after([](json& f) { f["model"]["merges"].push_back(7); }),
              HasSubstr("a merge is 7"));
  EXPECT_THAT(error_after([](json& f) { f["added_tokens"][0]["content"] = ""; }),
              HasSubstr("added token is empty"));
  EXPECT_THAT(error_after([](json& f) {
                f["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(";
              }),
              HasSubstr("splitting pattern is wrong"));
}

// Whoever prints or walks such a tree runs out of stack.
TEST(Tokenizer, RefusesDeepNesting) {
  const TemporaryFolder folder("tokenizer");
  const std::filesystem::path path = folder.path() / "tokenizer.json";
  std::string sequence = "null";
  for (int i = 0; i < repeats(20000, 5000); ++i)
    sequence = R"({"type":"Sequence","pretokenizers":[)" + sequence + "]}";
  for (const std::string& text : {R"({"model":{"type":)" + std::string(100000, '['),
                                  R"({"pre_tokenizer":)" + sequence + "}"}) {
    write_file(path, text);
    EXPECT_THAT([&] { Tokenizer{path}; },
                ThrowsMessage<commvq::Error>(HasSubstr("nested deeper than 64")));
  }
}

// An id of 2^24 - 1 would take half a gigabyte of tables, whatever the file's size.
TEST(Tokenizer, IdsDoNotOutgrowTheFile) {
  const std::size_t bytes = brief_file().dump().size();
  EXPECT_THAT(error_after([](json& f) { f["model"]["vocab"]["a"] = 16777215; }),
              AllOf(HasSubstr("16777215"), HasSubstr("bytes it must be in")));
  EXPECT_THAT(error_after([](json& f) { f["added_tokens"][0]["id"] = ~std::uint64_t{0}; }),
              HasSubstr("18446744073709551615"));
  EXPECT_EQ(error_after([&](json& f) { f["model"]["vocab"]["a"] = bytes / 4; }), "(no error)");
}

TEST(Tokenizer, QuotesStrangeTokensShortAndPrintable) {
  const std::string error =
      error_after([](json& f) { f["model"]["vocab"]["\x1b[2J" + std::string(100000, 'x')] = 5; });
  EXPECT_THAT(error, HasSubstr("not written in byte-level characters"));
  EXPECT_EQ(error.find('\x1b'), std::string::npos);
  EXPECT_LT(error.size(), 400u);
}

TEST(Tokenizer, ListsMustBeLists) {
  EXPECT_THAT(error_after([](json& f) { f["model"]["merges"] = 5; }), HasSubstr("merges is 5"));
  EXPECT_THAT(error_after([](json& f) { f["added_tokens"] = "none"; }),
              HasSubstr("added_tokens is \"none\""));
  EXPECT_THAT(error_after([](json& f) { f["pre_tokenizer"]["pretokenizers"] = json::object(); }),
              HasSubstr("pretokenizers is {}"));
}

/// The shipped tokenizer with another splitting pattern.
Tokenizer splitting_by(const std::string& pattern) {
  return changed(
      [&](json& f) { f["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern; });
}

// \C takes single bytes: what follows would begin within a character.
TEST(Tokenizer, PatternsMustNotSplitCharacters) {
  EXPECT_THAT([] { splitting_by(R"(\C)"); },
              ThrowsMessage<commvq::Error>(HasSubstr("splitting pattern is wrong")));
}

TEST(Tokenizer, PatternsMustNotTakeForEver) {
  const Tokenizer tokenizer = splitting_by("(a|aa)+[bc]");
  EXPECT_THAT([&] { tokenizer.encode(std::string(200, 'a')); },
              ThrowsMessage<commvq::Error>(HasSubstr("match limit")));
}

TEST(Tokenizer, TextThatIsNotSplitMustBeUtf8Too) {
  const Tokenizer tokenizer = changed([](json& f) {
    f["pre_tokenizer"] = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
  });
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("one\ntwo \xc3\xa9")), "one\ntwo \xc3\xa9");
  EXPECT_THAT([&] { tokenizer.encode("ab\xc3"); },
              ThrowsMessage<commvq::Error>(HasSubstr("UTF-8 error")));
}

// Searching for each of them anew after each of them would take half an hour.
TEST(Tokenizer, ManyAddedTokensInALongText) {
  constexpr int kAdded = 256, kOccurrences = repeats(200000, 20000);
  const Tokenizer tokenizer = changed([](json& f) {
    for (int i = 0; i < kAdded; ++i)
      f["added_tokens"].push_back(
          {{"id", 9000 + i}, {"content", "<|reserved_" + std::to_string(i) + "|>"}});
  });
  std::string text;
  for (int i = 0; i < kOccurrences; ++i) text += "<|reserved_7|>";
  EXPECT_EQ(tokenizer.encode(text), std::vector<int>(kOccurrences, 9007));
}

TEST(Tokenizer, TruncatedFilesAreRefused) {
  const TemporaryFolder folder("tokenizer");
  const std::filesystem::path path = folder.path() / "tokenizer.json";
  const std::string whole = read_file(shipped());
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{1}, whole.size() / 2, whole.rfind('}')}) {
    write_file(path, whole.substr(0, size));
    EXPECT_THROW(Tokenizer{path}, commvq::Error) << size << " bytes";
  }
  EXPECT_THAT([&] { Tokenizer{folder.path() / "missing.json"}; },
              ThrowsMessage<commvq::Error>(HasSubstr("cannot open")));
}

TEST(StreamingDecoder, HoldsBytesBackUntilACharacterIsWhole) {
  const Tokenizer tokenizer(shipped());
  std::mt19937_64 random(2);
  for (int repeat = 0; repeat < 100; ++repeat) {
    const std::string text = random_text(random, 30);
    StreamingDecoder decoder(tokenizer);
    std::string streamed;
    for (const int token : tokenizer.encode(text)) {
      const std::string ready = decoder.add(token);
      EXPECT_NO_THROW(tokenizer.encode(ready)) << "a piece that is not valid UTF-8";
      streamed += ready;
    }
    EXPECT_EQ(decoder.finish(), "");
    EXPECT_EQ(streamed, text);
  }
}

TEST(StreamingDecoder, HandsOutAnUnfinishedCharacterAtTheEnd) {
  const Tokenizer tokenizer(shipped());
  StreamingDecoder decoder(tokenizer);
  const std::vector<int> tokens = tokenizer.encode("\U0010ffff");
  ASSERT_EQ(tokens.size(), 4u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(decoder.add(tokens[static_cast<std::size_t>(i)]), "");
  EXPECT_EQ(decoder.finish(), "\xf4\x8f\xbf");
  EXPECT_EQ(decoder.finish(), "");
}

}  // namespace
}  // namespace engine
