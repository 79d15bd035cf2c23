#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "engine/tokenizer/fields.hpp"

namespace engine {

/// How text is cut into the pieces within which BPE merges: by a regular expression and read as
/// bytes (Llama 3, Qwen), at spaces written as U+2581 (Metaspace), or not at all.
class PreTokenizer {
 public:
  /// `step` is the field `pre_tokenizer`, or null. Throws `commvq::Error` for steps that this class
  /// does not compute, naming them.
  explicit PreTokenizer(const Json& step);

  /// True if pieces are read as bytes: a vocabulary of byte-level BPE.
  bool byte_level() const { return byte_level_; }

  /// Calls `piece` for every piece in order. `at_start`: nothing of the text came before.
  void split(std::string_view text, bool at_start,
             const std::function<void(std::string_view)>& piece) const;

 private:
  enum class Prepend { kNever, kFirst, kAlways };
  struct PatternDeleter {
    void operator()(void* pattern) const;
  };

  void add(const Json& step);
  void add_metaspace(const Json& step);
  void compile(const std::string& pattern);
  void split_by_pattern(std::string_view text,
                        const std::function<void(std::string_view)>& piece) const;
  void split_by_space(std::string_view text, bool at_start,
                      const std::function<void(std::string_view)>& piece) const;

  std::unique_ptr<void, PatternDeleter> pattern_;  ///< pcre2_code, or null: do not split
  bool byte_level_ = false;
  bool space_in_front_ = false;  ///< byte level: a space is put before text that begins with none
  std::string metaspace_;        ///< what a space is written as; empty: no Metaspace
  Prepend prepend_ = Prepend::kNever;
  bool cut_at_metaspace_ = false;
};

}  // namespace engine
