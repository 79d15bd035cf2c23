#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace engine {

/// Byte-level BPE as a Hugging Face `tokenizer.json` describes it: added tokens, a regular
/// expression that splits the text (PCRE2), bytes written as printable characters, merges by rank.
class Tokenizer {
 public:
  /// Throws `commvq::Error` for files that are not such a tokenizer and for steps that this class
  /// does not compute, naming them.
  explicit Tokenizer(const std::filesystem::path& tokenizer_json);

  /// Token ids of UTF-8 text. Added tokens written out in the text become their ids; nothing else
  /// is added. Throws `commvq::Error` if the text is not valid UTF-8.
  std::vector<int> encode(std::string_view text) const;

  /// The bytes of the tokens. A single token may end within a UTF-8 character. Throws
  /// `commvq::Error` for an id outside the vocabulary.
  std::string decode(const std::vector<int>& tokens) const;

  /// The id of an added token such as `<|endoftext|>`, or -1.
  int added_token(const std::string& content) const;

  int vocab_size() const { return static_cast<int>(bytes_of_.size()); }

 private:
  struct Merge {
    int rank;
    int result;
  };
  struct PatternDeleter {
    void operator()(void* pattern) const;
  };

  void encode_plain(std::string_view text, std::vector<int>& tokens) const;
  void encode_piece(std::string_view piece, std::vector<int>& tokens) const;
  void read_pre_tokenizer(const void* json);
  void compile(const std::string& pattern);

  std::vector<std::string> bytes_of_;                ///< by id; empty where the id is unused
  std::vector<char> known_;                          ///< by id
  std::unordered_map<std::string, int> id_of_;       ///< of whole tokens, as bytes
  std::unordered_map<std::uint64_t, Merge> merges_;  ///< by (left id << 32 | right id)
  std::map<std::string, int> added_;
  std::unique_ptr<void, PatternDeleter> pattern_;  ///< pcre2_code
  int byte_ids_[256];
  bool add_prefix_space_ = false;
  bool ignore_merges_ = false;
};

/// Text of a stream of tokens: holds bytes back until a UTF-8 character is whole.
class StreamingDecoder {
 public:
  explicit StreamingDecoder(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  /// Complete characters that this token finishes.
  std::string add(int token);
  /// What is left at the end, whole or not.
  std::string finish() { return std::exchange(pending_, {}); }

 private:
  const Tokenizer& tokenizer_;
  std::string pending_;
};

}  // namespace engine
