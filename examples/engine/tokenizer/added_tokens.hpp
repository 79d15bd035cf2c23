#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/tokenizer/fields.hpp"
#include "engine/tokenizer/normalizer.hpp"

namespace engine {

/// Tokens such as `<|endoftext|>` that are found in the text as they stand, before it is cut.
class AddedTokens {
 public:
  /// `list` is the field `added_tokens`, or null; ids must be below `file_bytes`. Tokens that are
  /// `normalized` are looked for in normalised text, as they read themselves after `normalizer`.
  /// Throws `commvq::Error` for empty ones and for options that this class does not compute.
  AddedTokens(const Json& list, const Normalizer& normalizer, std::size_t file_bytes);

  /// Ids by content, all of them.
  const std::map<std::string, int>& ids() const { return ids_; }

  struct Match {
    std::size_t begin, size;
    int id;
  };
  /// Walks through the added tokens of one text, which must outlive it; each token is searched for
  /// once between two of its occurrences.
  class Occurrences {
   public:
    /// The first that begins at `done` or later; of several at the same place the longest.
    std::optional<Match> next(std::size_t done);

   private:
    friend class AddedTokens;
    struct Token {
      std::string_view content;
      int id;
      std::size_t at;  ///< the next one
    };
    std::string_view text_;
    std::vector<Token> tokens_;
  };
  /// Those to be found in text as it was given, or in normalised text.
  Occurrences in(std::string_view text, bool normalized) const;

 private:
  std::map<std::string, int> ids_, as_given_, normalized_;
};

}  // namespace engine
