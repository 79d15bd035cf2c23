#pragma once

#include <cstddef>
#include <string_view>

namespace engine {

/// Bytes of the UTF-8 character that begins with `lead`; 1 for a stray byte.
inline std::size_t character_length(unsigned char lead) {
  if (lead >= 0xf0) return 4;
  if (lead >= 0xe0) return 3;
  return lead >= 0xc0 ? 2 : 1;
}

/// Throws `commvq::Error` naming the first byte that belongs to no character.
void require_utf8(std::string_view text);

}  // namespace engine
