#include "engine/tokenizer/bpe.hpp"

#include <cstdio>
#include <queue>
#include <utility>

#include "commvq/core/error.hpp"

#include "engine/json_file.hpp"
#include "engine/tokenizer/byte_alphabet.hpp"
#include "engine/tokenizer/utf8.hpp"

namespace engine {
namespace {

using commvq::require;

/// Both halves of a merge, written `["a", "b"]` or `"a b"`.
std::pair<std::string, std::string> halves(const Json& merge) {
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string())
    return {merge[0].get<std::string>(), merge[1].get<std::string>()};
  require(merge.is_string(), "tokenizer.json: a merge is ", shown(merge));
  const auto text = merge.get<std::string>();
  const std::size_t space = text.find(' ');
  require(space != std::string::npos, "tokenizer.json: a merge is \"", printable(text), "\"");
  return {text.substr(0, space), text.substr(space + 1)};
}

std::uint64_t pair_key(int left, int right) {
  return (static_cast<std::uint64_t>(left) << 32) | static_cast<std::uint32_t>(right);
}

/// Throws unless the field is absent, null or empty.
void require_empty(const Json& model, const char* name) {
  require(is_absent(model, name) || model[name] == "", "tokenizer.json: ", name, " is ",
          is_absent(model, name) ? "" : shown(model[name]), "; it is not supported");
}

/// A row of symbols that shrinks as neighbours are merged.
struct Symbol {
  int id, previous, next;
};

struct Candidate {
  int rank, left, left_id, right_id, result;
  bool operator<(const Candidate& other) const {  // the queue's top is the largest
    return std::pair(rank, left) > std::pair(other.rank, other.left);
  }
};

}  // namespace

Bpe::Bpe(const Json& model, bool byte_level, const std::map<std::string, int>& added,
         std::size_t file_bytes)
    : byte_level_(byte_level) {
  require(text_of(model, "type") == "BPE", "tokenizer.json: model type is ", shown(model["type"]),
          "; only BPE is supported");
  require(is_absent(model, "dropout") || model["dropout"] == 0, "tokenizer.json: dropout is ",
          is_absent(model, "dropout") ? "" : shown(model["dropout"]), "; it is not supported");
  require_empty(model, "continuing_subword_prefix");
  require_empty(model, "end_of_word_suffix");
  const bool byte_fallback = flag(model, "byte_fallback", false);
  require(!byte_fallback || !byte_level,
          "tokenizer.json: byte_fallback of a byte-level vocabulary is not supported");
  ignore_merges_ = flag(model, "ignore_merges", false);
  fuse_unknown_ = flag(model, "fuse_unk", false);
  read_vocabulary(field(model, "vocab"), added, file_bytes);
  if (!is_absent(model, "unk_token")) {
    const std::string unknown = text_of(model, "unk_token");
    const auto in_added = added.find(unknown);
    const auto in_vocabulary = id_of_.find(unknown);
    require(in_added != added.end() || in_vocabulary != id_of_.end(),
            "tokenizer.json: unk_token \"", unknown, "\" is not in vocab");
    unknown_ = in_added != added.end() ? in_added->second : in_vocabulary->second;
  }
  if (byte_level || byte_fallback) read_bytes(byte_fallback);
  read_merges(list(model, "merges"));
}

/// A token as pieces spell it.
std::string Bpe::key_of(const std::string& token) const {
  return byte_level_ ? bytes_of_printable(token) : token;
}

void Bpe::read_vocabulary(const Json& vocabulary, const std::map<std::string, int>& added,
                          std::size_t file_bytes) {
  require(vocabulary.is_object() && !vocabulary.empty(), "tokenizer.json: vocab is empty");
  for (const auto& [token, id] : vocabulary.items())
    if (added.count(token) == 0) id_of_[key_of(token)] = id_of(id, file_bytes);
}

void Bpe::read_bytes(bool byte_fallback) {
  for (int byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", byte);
    const auto found =
        id_of_.find(byte_fallback ? std::string(name) : std::string(1, static_cast<char>(byte)));
    require(found != id_of_.end(), "tokenizer.json: no token for byte ", byte, "; a vocabulary of ",
            byte_fallback ? "byte_fallback" : "byte level", " has all 256");
    byte_ids_[byte] = found->second;
  }
  has_bytes_ = true;
}

void Bpe::read_merges(const Json& merges) {
  int rank = 0;
  for (const Json& merge : merges) {
    auto [left, right] = halves(merge);
    left = key_of(left);
    right = key_of(right);
    for (const std::string& part : {left, right, left + right})
      require(id_of_.count(part) != 0, "tokenizer.json: merge ", shown(merge),
              " names a token that is not in vocab");
    merges_.try_emplace(pair_key(id_of_[left], id_of_[right]), Merge{rank++, id_of_[left + right]});
  }
}

/// Ids of a piece before any merge.
std::vector<int> Bpe::symbols_of(std::string_view piece) const {
  std::vector<int> ids;
  if (byte_level_) {
    for (const char byte : piece) ids.push_back(byte_ids_[static_cast<unsigned char>(byte)]);
    return ids;
  }
  bool after_unknown = false;
  while (!piece.empty()) {
    const std::string_view character =
        piece.substr(0, character_length(static_cast<unsigned char>(piece[0])));
    piece.remove_prefix(character.size());
    const auto found = id_of_.find(std::string(character));
    const bool unknown = found == id_of_.end() && !has_bytes_;
    if (found != id_of_.end()) {
      ids.push_back(found->second);
    } else if (has_bytes_) {
      for (const char byte : character) ids.push_back(byte_ids_[static_cast<unsigned char>(byte)]);
    } else if (unknown_ >= 0 && !(fuse_unknown_ && after_unknown)) {
      ids.push_back(unknown_);
    }
    after_unknown = unknown;
  }
  return ids;
}

void Bpe::encode(std::string_view piece, std::vector<int>& tokens) const {
  if (ignore_merges_)
    if (const auto whole = id_of_.find(std::string(piece)); whole != id_of_.end()) {
      tokens.push_back(whole->second);
      return;
    }
  const std::vector<int> ids = symbols_of(piece);
  const int size = static_cast<int>(ids.size());
  if (size == 0) return;
  std::vector<Symbol> symbols(ids.size());
  for (int i = 0; i < size; ++i) symbols[i] = {ids[i], i - 1, i + 1 < size ? i + 1 : -1};
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

}  // namespace engine
