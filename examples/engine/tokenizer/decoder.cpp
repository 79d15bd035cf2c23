#include "engine/tokenizer/decoder.hpp"

#include <charconv>

#include "commvq/core/error.hpp"

#include <nlohmann/json.hpp>

#include "engine/tokenizer/normalizer.hpp"

namespace engine {

using commvq::require;

Decoder::Decoder(const Json& step) {
  if (!step.is_null()) add(step);
}

void Decoder::set_space(const std::string& pattern, const std::string& content) {
  require(!pattern.empty() && content == " " && space_.empty(),
          "tokenizer.json: the decoder replaces \"", pattern, "\" by \"", content,
          "\"; only one character, by a space, is supported");
  space_ = pattern;
}

void Decoder::add(const Json& step) {
  const std::string type = text_of(step, "type");
  if (type == "Sequence") {
    for (const Json& part : field(step, "decoders")) add(part);
  } else if (type == "Replace") {
    set_space(text_of(field(step, "pattern"), "String"), text_of(step, "content"));
  } else if (type == "ByteFallback") {
    byte_fallback_ = true;
  } else if (type == "Strip") {
    require(text_of(step, "content") == " " && field(step, "stop") == 0,
            "tokenizer.json: the decoder strips ", step.dump(),
            "; only spaces in front are supported");
    spaces_in_front_ = id_of(field(step, "start"));
  } else if (type == "Metaspace") {
    set_space(text_of(step, "replacement"), " ");
    const bool never = is_absent(step, "prepend_scheme") ? !flag(step, "add_prefix_space", true)
                                                         : step["prepend_scheme"] == "never";
    spaces_in_front_ = never ? 0 : 1;
  } else {
    require(type == "ByteLevel" || type == "Fuse", "tokenizer.json: decoder \"", type,
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
