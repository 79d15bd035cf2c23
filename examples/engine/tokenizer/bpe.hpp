#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "engine/tokenizer/fields.hpp"

namespace engine {

/// The vocabulary and the merges of byte-pair encoding. Pieces begin as bytes (byte level) or as
/// characters, of which one without a token becomes its bytes, written `<0x41>` (byte fallback), or
/// the unknown token.
class Bpe {
 public:
  /// `model` is the field `model`; `added` are added tokens, which need not be written like the
  /// others; ids must be below `file_bytes`. Throws `commvq::Error` for other models and options
  /// and for files that contradict themselves.
  Bpe(const Json& model, bool byte_level, const std::map<std::string, int>& added,
      std::size_t file_bytes);

  /// Appends the tokens of one piece: neighbours are merged, lowest rank first and leftmost among
  /// equals, until no merge applies.
  void encode(std::string_view piece, std::vector<int>& tokens) const;

  /// Tokens as they are matched: bytes at byte level, else characters.
  const std::unordered_map<std::string, int>& vocabulary() const { return id_of_; }

 private:
  struct Merge {
    int rank;
    int result;
  };

  void read_vocabulary(const Json& vocabulary, const std::map<std::string, int>& added,
                       std::size_t file_bytes);
  void read_merges(const Json& merges);
  void read_bytes(bool byte_fallback);
  std::string key_of(const std::string& token) const;
  std::vector<int> symbols_of(std::string_view piece) const;

  bool byte_level_;
  bool ignore_merges_ = false;  ///< a piece that is a token is that token
  bool fuse_unknown_ = false;   ///< neighbouring unknown characters are one token
  int unknown_ = -1;            ///< -1: unknown characters are left out
  bool has_bytes_ = false;
  int byte_ids_[256] = {};
  std::unordered_map<std::string, int> id_of_;
  std::unordered_map<std::uint64_t, Merge> merges_;  ///< by (left id << 32 | right id)
};

}  // namespace engine
