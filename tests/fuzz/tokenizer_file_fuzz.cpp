// tokenizer.json: what is accepted must encode and decode texts of every kind, though a strange
// vocabulary need not give the text back.
#include <string_view>

#include "engine/tokenizer.hpp"
#include "fuzz/harness.hpp"
#include "fuzz/input_file.hpp"

namespace {

using namespace commvq;

/// Of the file: JSON values, and each token in the tables by id, by text and by merge.
constexpr std::size_t kMemoryMultiple = 64;

constexpr std::string_view kTexts[] = {
    "",
    "a",
    "ab ab  abab\n\n\tab",
    "It's 12 o'clock, isn't it?<end>",
    "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!",
    "\xff is not UTF-8"};

void use(const engine::Tokenizer& tokenizer) {
  for (const std::string_view text : kTexts)
    fuzz::accepts(text.size(), 1, [&] {
      const std::vector<int> tokens = tokenizer.encode(text);
      engine::StreamingDecoder decoder(tokenizer);
      std::string streamed;
      for (const int token : tokens) streamed += decoder.add(token);
      streamed += decoder.finish();
      fuzz::demand(streamed == tokenizer.decode(tokens), "decoding token by token differs");
    });
  tokenizer.added_token("<end>");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const fuzz::InputFile file("tokenizer.json");
  file.write({data, size});
  std::unique_ptr<engine::Tokenizer> tokenizer;
  if (fuzz::accepts(size, kMemoryMultiple,
                    [&] { tokenizer = std::make_unique<engine::Tokenizer>(file.path()); }))
    use(*tokenizer);
  return 0;
}
