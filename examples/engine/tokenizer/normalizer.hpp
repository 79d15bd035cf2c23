#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "engine/tokenizer/fields.hpp"

namespace engine {

/// What a tokenizer does to text before it is cut: NFC (Qwen), Prepend and Replace (Llama 2 and
/// Mistral, which write a space as U+2581), a Sequence of those, or nothing.
class Normalizer {
 public:
  /// `step` is the field `normalizer`, or null. Throws `commvq::Error` for any other step.
  explicit Normalizer(const Json& step);

  /// `text` must be UTF-8. Empty text stays empty.
  std::string apply(std::string_view text) const;
  bool changes_nothing() const { return steps_.empty(); }

 private:
  enum class Kind { kNfc, kPrepend, kReplace };
  struct Step {
    Kind kind;
    std::string pattern, content;
  };
  void add(const Json& step);

  std::vector<Step> steps_;
};

/// Every occurrence of `pattern` (not empty) replaced by `content`.
std::string replaced(std::string_view text, std::string_view pattern, std::string_view content);

}  // namespace engine
