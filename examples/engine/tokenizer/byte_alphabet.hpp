#pragma once

#include <string>

namespace engine {

/// Byte-level BPE writes every byte as a printable character: this turns a token as it stands in
/// `tokenizer.json` back into its bytes. Throws `commvq::Error` for any other character.
std::string bytes_of_printable(const std::string& token);

}  // namespace engine
