#include "engine/tokenizer/added_tokens.hpp"

#include "commvq/core/error.hpp"

#include <nlohmann/json.hpp>

namespace engine {

AddedTokens::AddedTokens(const Json& list, const Normalizer& normalizer) {
  for (const Json& token : list) {
    const std::string content = text_of(token, "content");
    commvq::require(!content.empty(), "tokenizer.json: an added token is empty");
    for (const char* option : {"single_word", "lstrip", "rstrip"})
      commvq::require(!flag(token, option, false), "tokenizer.json: added token \"", content,
                      "\" has ", option, ", which is not supported");
    const int id = id_of(field(token, "id"));
    ids_[content] = id;
    if (flag(token, "normalized", false) && !normalizer.changes_nothing()) {
      normalized_[normalizer.apply(content)] = id;
    } else {
      as_given_[content] = id;
    }
  }
}

AddedTokens::Match AddedTokens::first_in(std::string_view text, bool normalized) const {
  Match first;
  for (const auto& [content, id] : normalized ? normalized_ : as_given_) {
    const std::size_t at = text.find(content);
    if (at == std::string_view::npos) continue;
    if (first.id < 0 || at < first.begin || (at == first.begin && content.size() > first.size))
      first = {at, content.size(), id};
  }
  return first;
}

}  // namespace engine
