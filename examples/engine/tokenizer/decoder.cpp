#include "engine/tokenizer/decoder.hpp"

#include <charconv>

#include "commvq/core/error.hpp"

#include "engine/json_file.hpp"
#include "engine/tokenizer/normalizer.hpp"

namespace engine {

using commvq::require;

Decoder::Decoder(const Json& step) {
  if (!step.is_null()) add(step);
}

void Decoder::set_space(const std::string& pattern, const std::string& content) {
  require(!pattern.empty() && content == " " && space_.empty(),
          "tokenizer.json: the decoder replaces \"", printable(pattern), "\" by \"",
          printable(content), "\"; only one character, by a space, is supported");
  space_ = pattern;
}

void Decoder::add(const Json& step) {
  const std::string type = text_of(step, "type");
  if (type == "Sequence") {
    for (const Json& part : list(step, "decoders")) add(part);
  } else if (type == "Replace") {
    set_space(text_of(field(step, "pattern"), "String"), text_of(step, "content"));
  } else if (type == "ByteFallback") {
    byte_fallback_ = true;
  } else if (type == "Strip") {
    require(text_of(step, "content") == " " && field(step, "stop") == 0,
            "tokenizer.json: the decoder strips ", shown(step),
            "; only spaces in front are supported");
    const Json& start = field(step, "start");
    require(start.is_number_integer() && start >= 0 && start <= 1, "tokenizer.json: the decoder ",
            "strips ", shown(start), " spaces in front; it must be 0 or 1");
    spaces_in_front_ = start.get<int>();
  } else if (type == "Metaspace") {
    set_space(text_of(step, "replacement"), " ");
    const bool never = is_absent(step, "prepend_scheme") ? !flag(step, "add_prefix_space", true)
                                                         : step["prepend_scheme"] == "never";
    spaces_in_front_ = never ? 0 : 1;
  } else {
    require(type == "ByteLevel" || type == "Fuse", "tokenizer.json: decoder \"", printable(type),
            "\" is not supported; known are Sequence, Replace, ByteFallback, Fuse, Strip, "
            "Metaspace and ByteLevel");
  }
}

std::string Decoder::bytes_of(const std::string& token) const {
  if (byte_fallback_ && token.size() == 6 && token.starts_with("<0x") && token.back() == '>') {
    unsigned byte = 0;
    const auto [end, error] = std::from_chars(&token[3], &token[5], byte, 16);
    if (error == std::errc() && end == &token[5])
      return {static_cast<char>(static_cast<unsigned char>(byte))};
  }
  return space_.empty() ? token : replaced(token, space_, " ");
}

}  // namespace engine
