#include "engine/tokenizer/normalizer.hpp"

#include <cstdlib>
#include <memory>

#include "commvq/core/error.hpp"

#include <utf8proc.h>

#include "engine/json_file.hpp"

namespace engine {
namespace {

/// Canonical composition.
std::string nfc(std::string_view text) {
  utf8proc_uint8_t* composed = nullptr;
  const utf8proc_ssize_t size =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                   static_cast<utf8proc_ssize_t>(text.size()), &composed,
                   static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  commvq::require(size >= 0, "cannot normalise the text: ", utf8proc_errmsg(size));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(composed, &std::free);
  return {reinterpret_cast<const char*>(composed), static_cast<std::size_t>(size)};
}

}  // namespace

std::string replaced(std::string_view text, std::string_view pattern, std::string_view content) {
  std::string result;
  while (true) {
    const std::size_t at = text.find(pattern);
    result += text.substr(0, at);
    if (at == std::string_view::npos) return result;
    result += content;
    text.remove_prefix(at + pattern.size());
  }
}

Normalizer::Normalizer(const Json& step) {
  if (!step.is_null()) add(step);
}

void Normalizer::add(const Json& step) {
  const std::string type = text_of(step, "type");
  if (type == "Sequence") {
    for (const Json& part : list(step, "normalizers")) add(part);
  } else if (type == "NFC") {
    steps_.push_back({Kind::kNfc, {}, {}});
  } else if (type == "Prepend") {
    steps_.push_back({Kind::kPrepend, {}, text_of(step, "prepend")});
  } else if (type == "Replace") {
    const std::string pattern = text_of(field(step, "pattern"), "String");
    commvq::require(!pattern.empty(), "tokenizer.json: a normalizer replaces empty text");
    steps_.push_back({Kind::kReplace, pattern, text_of(step, "content")});
  } else {
    commvq::fail("tokenizer.json: normalizer \"", printable(type),
                 "\" is not supported; known are Sequence, NFC, Prepend and Replace");
  }
}

std::string Normalizer::apply(std::string_view text) const {
  std::string result(text);
  for (const Step& step : steps_) {
    if (result.empty()) break;
    if (step.kind == Kind::kNfc) result = nfc(result);
    if (step.kind == Kind::kPrepend) result.insert(0, step.content);
    if (step.kind == Kind::kReplace) result = replaced(result, step.pattern, step.content);
  }
  return result;
}

}  // namespace engine
