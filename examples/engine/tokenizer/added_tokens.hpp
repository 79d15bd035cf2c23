#pragma once

#include <map>
#include <string>
#include <string_view>

#include "engine/tokenizer/fields.hpp"
#include "engine/tokenizer/normalizer.hpp"

namespace engine {

/// Tokens such as `<|endoftext|>` that are found in the text as they stand, before it is cut.
class AddedTokens {
 public:
  /// `list` is the field `added_tokens`. Those that are `normalized` are looked for in normalised
  /// text, as they read themselves after `normalizer`. Throws `commvq::Error` for empty ones and
  /// for options that this class does not compute.
  AddedTokens(const Json& list, const Normalizer& normalizer);

  /// Ids by content, all of them.
  const std::map<std::string, int>& ids() const { return ids_; }

  struct Match {
    std::size_t begin = std::string_view::npos;  ///< npos: none
    std::size_t size = 0;
    int id = -1;
  };
  /// The first added token of the text as it was given, or of normalised text; of several at the
  /// same place the longest.
  Match first_in(std::string_view text, bool normalized) const;

 private:
  std::map<std::string, int> ids_, as_given_, normalized_;
};

}  // namespace engine
