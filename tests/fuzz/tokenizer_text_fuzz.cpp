// Any text through a good tokenizer: UTF-8 comes back as it was, anything else is refused.
#include "engine/tokenizer.hpp"
#include "fuzz/byte_tokenizer.hpp"
#include "fuzz/harness.hpp"
#include "fuzz/input_file.hpp"

namespace {

using namespace commvq;

/// Of the text: symbols and candidates of the merges, 28 bytes a byte, in vectors that double.
constexpr std::size_t kMemoryMultiple = 128;

engine::Tokenizer tokenizer_after(void (*change)(nlohmann::json&)) {
  const fuzz::InputFile file("tokenizer.json");
  nlohmann::json json = fuzz::byte_tokenizer();
  change(json);
  const std::string text = json.dump();
  file.write({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
  return engine::Tokenizer(file.path());
}

void check(const engine::Tokenizer& tokenizer, std::string_view text) {
  const std::vector<int> tokens = tokenizer.encode(text);
  fuzz::demand(tokenizer.decode(tokens) == text, "a text that does not come back");
  fuzz::demand(tokens.size() <= text.size(), "more tokens than bytes");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const engine::Tokenizer split = tokenizer_after([](nlohmann::json&) {});
  static const engine::Tokenizer whole =
      tokenizer_after([](nlohmann::json& json) { json["pre_tokenizer"]["use_regex"] = false; });
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const bool accepted = fuzz::accepts(size, kMemoryMultiple, [&] { check(split, text); });
  fuzz::demand(accepted == fuzz::accepts(size, kMemoryMultiple, [&] { check(whole, text); }),
               "whether a text is UTF-8 depends on the splitting");
  return 0;
}
