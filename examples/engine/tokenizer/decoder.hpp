#pragma once

#include <string>

#include "engine/tokenizer/fields.hpp"

namespace engine {

/// How tokens that are not byte level become text again: U+2581 back to a space (Replace or
/// Metaspace), `<0x41>` to its byte (ByteFallback), one space taken from the front (Strip).
class Decoder {
 public:
  /// `step` is the field `decoder`, or null. Throws `commvq::Error` for any other step.
  explicit Decoder(const Json& step);

  /// The bytes of one token of a text.
  std::string bytes_of(const std::string& token) const;
  /// Spaces that a whole text loses at its front, where it has them.
  int spaces_in_front() const { return spaces_in_front_; }

 private:
  void add(const Json& step);
  void set_space(const std::string& pattern, const std::string& content);

  std::string space_;  ///< what stands for a space; empty: nothing
  bool byte_fallback_ = false;
  int spaces_in_front_ = 0;
};

}  // namespace engine
