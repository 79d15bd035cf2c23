#include "engine/tokenizer/byte_alphabet.hpp"

#include <map>

#include "commvq/core/error.hpp"

#include "engine/json_file.hpp"
#include "engine/tokenizer/utf8.hpp"

namespace engine {
namespace {

/// Bytes by the character that stands for them: printable ones for themselves, the others from
/// U+0100 on.
std::map<unsigned, char> make_alphabet() {
  std::map<unsigned, char> byte_of;
  unsigned next = 256;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    byte_of[printable ? byte : next++] = static_cast<char>(byte);
  }
  return byte_of;
}

}  // namespace

std::string bytes_of_printable(const std::string& token) {
  static const std::map<unsigned, char> byte_of = make_alphabet();
  std::string bytes;
  for (std::size_t i = 0; i < token.size();) {
    const auto lead = static_cast<unsigned char>(token[i]);
    const std::size_t length = character_length(lead);
    unsigned character = lead;
    if (length == 2 && i + 1 < token.size())
      character = ((lead & 0x1fu) << 6) | (static_cast<unsigned char>(token[i + 1]) & 0x3fu);
    const auto found = byte_of.find(character);
    commvq::require(length <= 2 && found != byte_of.end(), "tokenizer.json: token \"",
                    printable(token), "\" is not written in byte-level characters");
    bytes += found->second;
    i += length;
  }
  return bytes;
}

}  // namespace engine
