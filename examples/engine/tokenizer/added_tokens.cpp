#include "engine/tokenizer/added_tokens.hpp"

#include "commvq/core/error.hpp"

#include "engine/json_file.hpp"

namespace engine {

using commvq::require;

AddedTokens::AddedTokens(const Json& list, const Normalizer& normalizer, std::size_t file_bytes) {
  require(list.is_null() || list.is_array(), "tokenizer.json: added_tokens is ", shown(list),
          "; it must be a list");
  for (const Json& token : list) {
    const std::string content = text_of(token, "content");
    require(!content.empty(), "tokenizer.json: an added token is empty");
    for (const char* option : {"single_word", "lstrip", "rstrip"})
      require(!flag(token, option, false), "tokenizer.json: added token \"", printable(content),
              "\" has ", option, ", which is not supported");
    const int id = id_of(field(token, "id"), file_bytes);
    ids_[content] = id;
    if (flag(token, "normalized", false) && !normalizer.changes_nothing()) {
      normalized_[normalizer.apply(content)] = id;
    } else {
      as_given_[content] = id;
    }
  }
}

AddedTokens::Occurrences AddedTokens::in(std::string_view text, bool normalized) const {
  Occurrences result;
  result.text_ = text;
  for (const auto& [content, id] : normalized ? normalized_ : as_given_)
    result.tokens_.push_back({content, id, text.find(content)});
  return result;
}

std::optional<AddedTokens::Match> AddedTokens::Occurrences::next(std::size_t done) {
  std::optional<Match> nearest;
  for (Token& token : tokens_) {
    if (token.at < done) token.at = text_.find(token.content, done);
    if (token.at == std::string_view::npos) continue;
    if (!nearest || token.at < nearest->begin ||
        (token.at == nearest->begin && token.content.size() > nearest->size))
      nearest = {token.at, token.content.size(), token.id};
  }
  return nearest;
}

}  // namespace engine
