#include "engine/tokenizer.hpp"

#include <algorithm>
#include <limits>

#include "commvq/core/error.hpp"

#include "engine/json_file.hpp"
#include "engine/tokenizer/added_tokens.hpp"
#include "engine/tokenizer/bpe.hpp"
#include "engine/tokenizer/decoder.hpp"
#include "engine/tokenizer/fields.hpp"
#include "engine/tokenizer/normalizer.hpp"
#include "engine/tokenizer/pre_tokenizer.hpp"
#include "engine/tokenizer/utf8.hpp"

namespace engine {
namespace {

using commvq::require;

const Json& optional(const Json& json, const char* name) {
  static const Json null;
  return json.contains(name) ? json[name] : null;
}

}  // namespace

struct Tokenizer::Steps {
  Steps(const Json& json, std::size_t file_bytes)
      : normalizer(optional(json, "normalizer")),
        pre_tokenizer(optional(json, "pre_tokenizer")),
        added(optional(json, "added_tokens"), normalizer, file_bytes),
        bpe(field(json, "model"), pre_tokenizer.byte_level(), added.ids(), file_bytes) {}

  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  AddedTokens added;
  Bpe bpe;
};

Tokenizer::Tokenizer(const std::filesystem::path& path) {
  const std::string file = read_json_text(path);
  const Json json = parse_json(file, path);
  require(json.is_object(), path.string(), " is not a JSON object");
  steps_ = std::make_unique<const Steps>(json, file.size());
  const Decoder decoder(optional(json, "decoder"));
  if (!steps_->pre_tokenizer.byte_level()) spaces_in_front_ = decoder.spaces_in_front();
  for (const auto& [content, id] : steps_->added.ids()) set_bytes(id, content);
  for (const auto& [token, id] : steps_->bpe.vocabulary())
    set_bytes(id, steps_->pre_tokenizer.byte_level() ? token : decoder.bytes_of(token));
  read_template(&optional(json, "post_processor"), file.size());
}

Tokenizer::~Tokenizer() = default;

void Tokenizer::set_bytes(int id, const std::string& bytes) {
  if (id >= vocab_size()) {
    bytes_of_.resize(static_cast<std::size_t>(id) + 1);
    known_.resize(bytes_of_.size(), 0);
  }
  bytes_of_[static_cast<std::size_t>(id)] = bytes;
  known_[static_cast<std::size_t>(id)] = 1;
}

/// What TemplateProcessing puts before and after a single text.
void Tokenizer::read_template(const void* pointer, std::size_t file_bytes) {
  const Json& step = *static_cast<const Json*>(pointer);
  if (step.is_null()) return;
  const std::string type = text_of(step, "type");
  if (type == "Sequence") {
    for (const Json& part : list(step, "processors")) read_template(&part, file_bytes);
    return;
  }
  if (type == "ByteLevel") return;  // it concerns offsets alone
  require(type == "TemplateProcessing", "tokenizer.json: post-processor \"", printable(type),
          "\" is not supported; known are Sequence, ByteLevel and TemplateProcessing");
  bool before = true;
  for (const Json& part : list(step, "single")) {
    if (part.is_object() && part.contains("Sequence")) {
      before = false;
      continue;
    }
    const std::string token = text_of(field(part, "SpecialToken"), "id");
    for (const Json& id : list(field(field(step, "special_tokens"), token.c_str()), "ids"))
      (before ? prefix_ : suffix_).push_back(id_of(id, file_bytes));
  }
}

int Tokenizer::added_token(const std::string& content) const {
  const auto found = steps_->added.ids().find(content);
  return found == steps_->added.ids().end() ? -1 : found->second;
}

std::vector<int> Tokenizer::encode(std::string_view text) const {
  require(text.size() <= std::numeric_limits<int>::max(), "a text of ", text.size(),
          " bytes; at most ", std::numeric_limits<int>::max(), " are encoded at a time");
  require_utf8(text);
  std::vector<int> tokens;
  AddedTokens::Occurrences occurrences = steps_->added.in(text, /*normalized=*/false);
  for (std::size_t done = 0; done < text.size();) {
    const auto found = occurrences.next(done);
    const std::string_view before = text.substr(done, found ? found->begin - done : text.npos);
    encode_normalized(steps_->normalizer.apply(before), /*at_start=*/done == 0, tokens);
    if (!found) break;
    tokens.push_back(found->id);
    done = found->begin + found->size;
  }
  return tokens;
}

/// Normalised text, in which some added tokens are still to be found.
void Tokenizer::encode_normalized(std::string_view text, bool at_start,
                                  std::vector<int>& tokens) const {
  AddedTokens::Occurrences occurrences = steps_->added.in(text, /*normalized=*/true);
  for (std::size_t done = 0; done < text.size();) {
    const auto found = occurrences.next(done);
    steps_->pre_tokenizer.split(text.substr(done, found ? found->begin - done : text.npos),
                                at_start && done == 0,
                                [&](std::string_view piece) { steps_->bpe.encode(piece, tokens); });
    if (!found) break;
    tokens.push_back(found->id);
    done = found->begin + found->size;
  }
}

std::vector<int> Tokenizer::encode_with_template(std::string_view text) const {
  std::vector<int> tokens = prefix_;
  const std::vector<int> content = encode(text);
  tokens.insert(tokens.end(), content.begin(), content.end());
  tokens.insert(tokens.end(), suffix_.begin(), suffix_.end());
  return tokens;
}

const std::string& Tokenizer::bytes_of(int token) const {
  require(token >= 0 && token < vocab_size() && known_[static_cast<std::size_t>(token)], "token ",
          token, " is not in the tokenizer's vocabulary of ", vocab_size());
  return bytes_of_[static_cast<std::size_t>(token)];
}

std::string Tokenizer::decode(const std::vector<int>& tokens) const {
  std::string text;
  for (const int token : tokens) text += bytes_of(token);
  const std::size_t spaces = std::min(text.find_first_not_of(' '), text.size());
  return text.substr(std::min(spaces, static_cast<std::size_t>(spaces_in_front_)));
}

std::string StreamingDecoder::add(int token) {
  pending_ += tokenizer_.bytes_of(token);
  std::size_t start = pending_.size();  // of the last character
  while (start > 0 && pending_.size() - start < 4) {
    --start;
    if ((static_cast<unsigned char>(pending_[start]) & 0xc0) != 0x80) break;
  }
  const bool whole =
      pending_.empty() ||
      pending_.size() - start >= character_length(static_cast<unsigned char>(pending_[start]));
  std::string ready = whole ? pending_ : pending_.substr(0, start);
  pending_.erase(0, ready.size());
  return ready;
}

}  // namespace engine
