#pragma once

#include <string>
#include <vector>

#include <nlohmann/json.hpp>

/// A small byte-level tokenizer in the format of tokenizer.json, for seeds and harnesses.
namespace commvq::fuzz {

/// The character by which byte-level BPE writes a byte, as UTF-8.
inline std::string byte_character(unsigned byte) {
  const auto printable = [](unsigned b) {
    return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  };
  unsigned character = byte;
  if (!printable(byte)) {
    character = 256;
    for (unsigned b = 0; b < byte; ++b) character += printable(b) ? 0 : 1;
  }
  if (character < 0x80) return {static_cast<char>(character)};
  return {static_cast<char>(0xc0 | character >> 6), static_cast<char>(0x80 | (character & 0x3f))};
}

/// All 256 bytes, a few merges, and two added tokens of which one begins the other.
inline nlohmann::json byte_tokenizer() {
  nlohmann::json vocab = nlohmann::json::object(), merges = nlohmann::json::array();
  int id = 0;
  for (unsigned byte = 0; byte < 256; ++byte) vocab[byte_character(byte)] = id++;
  const std::string space = byte_character(' ');
  for (const auto& [left, right] :
       {std::pair<std::string, std::string>{"a", "b"}, {"ab", "ab"}, {space, "ab"}, {"e", "n"}}) {
    vocab[left + right] = id++;
    merges.push_back({left, right});
  }
  return {
      {"added_tokens",
       {{{"id", id}, {"content", "<end>"}}, {{"id", id + 1}, {"content", "<end>>"}}}},
      {"normalizer", nullptr},
      {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}},
      {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", merges}}}};
}

}  // namespace commvq::fuzz
