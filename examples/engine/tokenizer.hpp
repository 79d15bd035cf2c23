#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace engine {

/// BPE as a Hugging Face `tokenizer.json` describes it, in the forms of Llama, Mistral and Qwen:
/// byte level with a regular expression that splits the text, or characters with spaces written as
/// U+2581 and bytes as a fallback. See `engine/tokenizer/` for the steps.
class Tokenizer {
 public:
  /// Throws `commvq::Error` for files that are not such a tokenizer and for steps that this class
  /// does not compute, naming them.
  explicit Tokenizer(const std::filesystem::path& tokenizer_json);
  ~Tokenizer();

  /// Token ids of UTF-8 text. Added tokens written out in the text become their ids; nothing else
  /// is added. Throws `commvq::Error` if the text is not valid UTF-8.
  std::vector<int> encode(std::string_view text) const;

  /// Tokens that belong before (`<s>`) and after a text by the file's template; often none.
  const std::vector<int>& prefix() const { return prefix_; }
  const std::vector<int>& suffix() const { return suffix_; }
  /// `prefix()`, the text, `suffix()`.
  std::vector<int> encode_with_template(std::string_view text) const;

  /// The bytes of the tokens. A single token may end within a UTF-8 character. Where the file says
  /// that a text gets a space in front, that one is taken away. Throws `commvq::Error` for an id
  /// outside the vocabulary.
  std::string decode(const std::vector<int>& tokens) const;

  /// The bytes of a token inside a text. Throws like `decode`.
  const std::string& bytes_of(int token) const;

  /// The id of an added token such as `<|endoftext|>`, or -1.
  int added_token(const std::string& content) const;

  int vocab_size() const { return static_cast<int>(bytes_of_.size()); }

 private:
  struct Steps;
  void set_bytes(int id, const std::string& bytes);
  void read_template(const void* json, std::size_t file_bytes);
  void encode_normalized(std::string_view text, bool at_start, std::vector<int>& tokens) const;

  std::unique_ptr<const Steps> steps_;
  std::vector<std::string> bytes_of_;  ///< by id; empty where the id is unused
  std::vector<char> known_;            ///< by id
  std::vector<int> prefix_, suffix_;
  int spaces_in_front_ = 0;  ///< of a whole text, that decoding takes away
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
