#define PCRE2_CODE_UNIT_WIDTH 8
#include "engine/tokenizer.hpp"

#include <algorithm>
#include <limits>
#include <queue>
#include <utility>

#include "commvq/core/error.hpp"

#include <nlohmann/json.hpp>
#include <pcre2.h>

#include "engine/json_file.hpp"

namespace engine {
namespace {

using Json = nlohmann::json;
using commvq::require;

/// GPT-2's split, which ByteLevel applies where `use_regex` is true.
constexpr const char* kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

/// The whole text as one piece, where no step splits it.
constexpr const char* kWholePattern = "(?s).+";

/// Steps of one match, so that no pattern takes for ever; splitting patterns need a few a byte.
constexpr std::uint32_t kMaxMatchSteps = 1'000'000;

/// The character by which byte-level BPE writes each byte: printable ones as themselves, the others
/// from U+0100 on.
std::vector<unsigned> byte_characters() {
  std::vector<unsigned> characters(256);
  unsigned next = 256;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    characters[byte] = printable ? byte : next++;
  }
  return characters;
}

/// Length of the UTF-8 character that begins with `lead`; 1 for a stray byte.
std::size_t character_length(unsigned char lead) {
  if (lead >= 0xf0) return 4;
  if (lead >= 0xe0) return 3;
  return lead >= 0xc0 ? 2 : 1;
}

/// Printable characters of a token back to its bytes.
std::string to_bytes(const std::string& token) {
  static const std::map<unsigned, char> byte_of = [] {
    std::map<unsigned, char> result;
    const std::vector<unsigned> characters = byte_characters();
    for (unsigned byte = 0; byte < 256; ++byte) result[characters[byte]] = static_cast<char>(byte);
    return result;
  }();
  std::string bytes;
  for (std::size_t i = 0; i < token.size();) {
    const auto lead = static_cast<unsigned char>(token[i]);
    const std::size_t length = character_length(lead);
    unsigned character = lead;
    if (length == 2 && i + 1 < token.size())
      character = ((lead & 0x1fu) << 6) | (static_cast<unsigned char>(token[i + 1]) & 0x3fu);
    const auto found = byte_of.find(character);
    require(length <= 2 && found != byte_of.end(), "tokenizer.json: token \"", printable(token),
            "\" is not written in byte-level characters");
    bytes += found->second;
    i += length;
  }
  return bytes;
}

/// A field that must exist.
const Json& field(const Json& object, const char* name) {
  require(object.is_object() && object.contains(name), "tokenizer.json: no field ", name);
  return object[name];
}

bool flag(const Json& object, const char* name, bool otherwise) {
  if (!object.contains(name) || object[name].is_null()) return otherwise;
  require(object[name].is_boolean(), "tokenizer.json: ", name, " is ", shown(object[name]),
          "; it must be true or false");
  return object[name].get<bool>();
}

std::string text_of(const Json& object, const char* name) {
  const Json& value = field(object, name);
  require(value.is_string(), "tokenizer.json: ", name, " is ", shown(value),
          "; it must be a string");
  return value.get<std::string>();
}

const Json& list(const Json& object, const char* name) {
  const Json& value = field(object, name);
  require(value.is_array(), "tokenizer.json: ", name, " is ", shown(value), "; it must be a list");
  return value;
}

/// A token id of a file of `file_bytes`: tables by id must not outgrow the file.
int id_of(const Json& value, std::size_t file_bytes) {
  const std::size_t limit = std::min<std::size_t>(file_bytes, 1 << 24);
  require(value.is_number_integer() && value >= 0 && value < limit,
          "tokenizer.json: a token id is ", shown(value), "; in a file of ", file_bytes,
          " bytes it must be in [0, ", limit - 1, "]");
  return value.get<int>();
}

/// Both halves of a merge, written `["a", "b"]` or `"a b"`.
std::pair<std::string, std::string> halves(const Json& merge) {
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string())
    return {to_bytes(merge[0].get<std::string>()), to_bytes(merge[1].get<std::string>())};
  require(merge.is_string(), "tokenizer.json: a merge is ", shown(merge));
  const auto text = merge.get<std::string>();
  const std::size_t space = text.find(' ');
  require(space != std::string::npos, "tokenizer.json: a merge is \"", printable(text), "\"");
  return {to_bytes(text.substr(0, space)), to_bytes(text.substr(space + 1))};
}

std::uint64_t pair_key(int left, int right) {
  return (static_cast<std::uint64_t>(left) << 32) | static_cast<std::uint32_t>(right);
}

}  // namespace

void Tokenizer::PatternDeleter::operator()(void* pattern) const {
  pcre2_code_free(static_cast<pcre2_code*>(pattern));
}

Tokenizer::Tokenizer(const std::filesystem::path& path) {
  const std::string file = read_json_text(path);
  const Json json = parse_json(file, path);
  require(json.is_object(), path.string(), " is not a JSON object");
  require(!json.contains("normalizer") || json["normalizer"].is_null(),
          "tokenizer.json: a normalizer is given; this tokenizer applies none");
  const Json& model = field(json, "model");
  require(text_of(model, "type") == "BPE", "tokenizer.json: model type is ", shown(model["type"]),
          "; only BPE is supported");
  require(!flag(model, "byte_fallback", false), "tokenizer.json: byte_fallback is not supported");
  ignore_merges_ = flag(model, "ignore_merges", false);

  const Json& vocabulary = field(model, "vocab");
  require(vocabulary.is_object() && !vocabulary.empty(), "tokenizer.json: vocab is empty");
  const auto add = [&](int id, const std::string& bytes) {
    if (id >= vocab_size()) {
      bytes_of_.resize(static_cast<std::size_t>(id) + 1);
      known_.resize(bytes_of_.size(), 0);
    }
    bytes_of_[static_cast<std::size_t>(id)] = bytes;
    known_[static_cast<std::size_t>(id)] = 1;
  };
  if (json.contains("added_tokens"))
    for (const Json& token : list(json, "added_tokens")) {
      const std::string content = text_of(token, "content");
      require(!content.empty(), "tokenizer.json: an added token is empty");
      added_[content] = id_of(field(token, "id"), file.size());
      add(added_[content], content);
    }
  for (const auto& [token, id] : vocabulary.items()) {
    if (added_.count(token) != 0) continue;
    const std::string bytes = to_bytes(token);
    id_of_[bytes] = id_of(id, file.size());
    add(id_of_[bytes], bytes);
  }
  for (int byte = 0; byte < 256; ++byte) {
    const auto found = id_of_.find(std::string(1, static_cast<char>(byte)));
    require(found != id_of_.end(), "tokenizer.json: no token for byte ", byte,
            "; a byte-level vocabulary has all 256");
    byte_ids_[byte] = found->second;
  }
  int rank = 0;
  for (const Json& merge : list(model, "merges")) {
    const auto [left, right] = halves(merge);
    for (const std::string& part : {left, right, left + right})
      require(id_of_.count(part) != 0, "tokenizer.json: merge ", shown(merge),
              " names a token that is not in vocab");
    merges_.try_emplace(pair_key(id_of_[left], id_of_[right]), Merge{rank++, id_of_[left + right]});
  }
  read_pre_tokenizer(&field(json, "pre_tokenizer"));
  if (pattern_ == nullptr) compile(kWholePattern);
}

void Tokenizer::read_pre_tokenizer(const void* pointer) {
  const Json& step = *static_cast<const Json*>(pointer);
  const std::string type = text_of(step, "type");
  if (type == "Sequence") {
    for (const Json& part : list(step, "pretokenizers")) read_pre_tokenizer(&part);
  } else if (type == "Split") {
    require(pattern_ == nullptr, "tokenizer.json: more than one splitting step");
    require(text_of(step, "behavior") == "Isolated" && !flag(step, "invert", false),
            "tokenizer.json: Split with behavior ", shown(step["behavior"]),
            "; only Isolated, not inverted, is supported");
    compile(text_of(field(step, "pattern"), "Regex"));
  } else if (type == "ByteLevel") {
    add_prefix_space_ = flag(step, "add_prefix_space", true);
    if (flag(step, "use_regex", true)) {
      require(pattern_ == nullptr, "tokenizer.json: more than one splitting step");
      compile(kGpt2Pattern);
    }
  } else {
    commvq::fail("tokenizer.json: pre-tokenizer \"", printable(type),
                 "\" is not supported; known are Sequence, Split and ByteLevel");
  }
}

void Tokenizer::compile(const std::string& pattern) {
  // \C matches a single byte, which would split characters.
  constexpr std::uint32_t kOptions = PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C;
  int code = 0;
  PCRE2_SIZE where = 0;
  pattern_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                               kOptions, &code, &where, nullptr));
  if (pattern_ != nullptr) {
    pcre2_jit_compile(static_cast<pcre2_code*>(pattern_.get()), PCRE2_JIT_COMPLETE);
    return;
  }
  PCRE2_UCHAR message[256];
  pcre2_get_error_message(code, message, sizeof message);
  commvq::fail("tokenizer.json: the splitting pattern is wrong at character ", where, ": ",
               reinterpret_cast<const char*>(message));
}

int Tokenizer::added_token(const std::string& content) const {
  const auto found = added_.find(content);
  return found == added_.end() ? -1 : found->second;
}

std::vector<int> Tokenizer::encode(std::string_view text) const {
  require(text.size() <= std::numeric_limits<int>::max(), "a text of ", text.size(),
          " bytes; at most ", std::numeric_limits<int>::max(), " are encoded at a time");
  struct Occurrence {
    std::string_view content;
    int token;
    std::size_t at;  // the next one, at or after what is encoded
  };
  std::vector<Occurrence> occurrences;
  for (const auto& [content, token] : added_)
    occurrences.push_back({content, token, text.find(content)});

  std::vector<int> tokens;
  for (std::size_t done = 0; done < text.size();) {
    const Occurrence* nearest = nullptr;  // of tokens at the same place the longest
    for (Occurrence& next : occurrences) {
      if (next.at < done) next.at = text.find(next.content, done);
      if (next.at == std::string_view::npos) continue;
      if (nearest == nullptr || next.at < nearest->at ||
          (next.at == nearest->at && next.content.size() > nearest->content.size()))
        nearest = &next;
    }
    encode_plain(text.substr(done, nearest == nullptr ? text.npos : nearest->at - done), tokens);
    if (nearest == nullptr) break;
    tokens.push_back(nearest->token);
    done = nearest->at + nearest->content.size();
  }
  return tokens;
}

/// Text without added tokens: matches of the pattern and what lies between them are pieces.
void Tokenizer::encode_plain(std::string_view text, std::vector<int>& tokens) const {
  if (text.empty()) return;
  std::string with_space;
  if (add_prefix_space_ && text.front() != ' ') {
    with_space = " " + std::string(text);
    text = with_space;
  }
  const auto* const pattern = static_cast<const pcre2_code*>(pattern_.get());
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
      pcre2_match_data_create_from_pattern(pattern, nullptr), &pcre2_match_data_free);
  const std::unique_ptr<pcre2_match_context, decltype(&pcre2_match_context_free)> limits(
      pcre2_match_context_create(nullptr), &pcre2_match_context_free);
  pcre2_set_match_limit(limits.get(), kMaxMatchSteps);
  const auto* const subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  std::size_t done = 0;
  std::uint32_t options = 0;  // the first call checks the whole text's UTF-8
  while (done < text.size()) {
    const int result =
        pcre2_match(pattern, subject, text.size(), done, options, match.get(), limits.get());
    if (result == PCRE2_ERROR_NOMATCH) break;
    if (result < 0) {
      PCRE2_UCHAR message[256];
      pcre2_get_error_message(result, message, sizeof message);
      commvq::fail("cannot split the text after byte ", done, ": ",
                   reinterpret_cast<const char*>(message));
    }
    options = PCRE2_NO_UTF_CHECK;
    const PCRE2_SIZE* const range = pcre2_get_ovector_pointer(match.get());
    require(range[1] > range[0], "tokenizer.json: the splitting pattern matches nothing at byte ",
            range[0], " of the text; it must match characters");
    if (range[0] > done) encode_piece(text.substr(done, range[0] - done), tokens);
    encode_piece(text.substr(range[0], range[1] - range[0]), tokens);
    done = range[1];
  }
  if (done < text.size()) encode_piece(text.substr(done), tokens);
}

/// Merges neighbours, lowest rank first and leftmost among equals, until no merge applies.
void Tokenizer::encode_piece(std::string_view piece, std::vector<int>& tokens) const {
  if (ignore_merges_)
    if (const auto whole = id_of_.find(std::string(piece)); whole != id_of_.end()) {
      tokens.push_back(whole->second);
      return;
    }
  struct Symbol {
    int id, previous, next;
  };
  struct Candidate {
    int rank, left, left_id, right_id, result;
    bool operator<(const Candidate& other) const {  // the queue's top is the largest
      return std::pair(rank, left) > std::pair(other.rank, other.left);
    }
  };
  const int size = static_cast<int>(piece.size());
  std::vector<Symbol> symbols(piece.size());
  for (int i = 0; i < size; ++i)
    symbols[static_cast<std::size_t>(i)] = {byte_ids_[static_cast<unsigned char>(piece[i])], i - 1,
                                            i + 1 < size ? i + 1 : -1};
  std::priority_queue<Candidate> queue;
  const auto consider = [&](int left) {
    if (left < 0 || symbols[left].next < 0) return;
    const int left_id = symbols[left].id, right_id = symbols[symbols[left].next].id;
    const auto found = merges_.find(pair_key(left_id, right_id));
    if (found != merges_.end())
      queue.push({found->second.rank, left, left_id, right_id, found->second.result});
  };
  for (int i = 0; i < size; ++i) consider(i);
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbols[best.left];
    if (left.id != best.left_id || left.next < 0 || symbols[left.next].id != best.right_id)
      continue;
    Symbol& right = symbols[left.next];
    left.id = best.result;
    right.id = -1;  // no token: candidates that name it are void
    left.next = right.next;
    if (left.next >= 0) symbols[left.next].previous = best.left;
    consider(left.previous);
    consider(best.left);
  }
  for (int i = 0; i >= 0; i = symbols[i].next) tokens.push_back(symbols[i].id);
}

std::string Tokenizer::decode(const std::vector<int>& tokens) const {
  std::string text;
  for (const int token : tokens) {
    require(token >= 0 && token < vocab_size() && known_[static_cast<std::size_t>(token)], "token ",
            token, " is not in the tokenizer's vocabulary of ", vocab_size());
    text += bytes_of_[static_cast<std::size_t>(token)];
  }
  return text;
}

std::string StreamingDecoder::add(int token) {
  pending_ += tokenizer_.decode({token});
  std::size_t start = pending_.size();  // of the last character
  while (start > 0 && pending_.size() - start < 4) {
    --start;
    if ((static_cast<unsigned char>(pending_[start]) & 0xc0) != 0x80) break;
  }
  const bool whole =
      pending_.empty() ||
      pending_.size() - start >= character_length(static_cast<unsigned char>(pending_[start]));
  const std::string ready = whole ? pending_ : pending_.substr(0, start);
  pending_.erase(0, ready.size());
  return ready;
}

}  // namespace engine
