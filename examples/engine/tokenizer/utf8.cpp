#include "engine/tokenizer/utf8.hpp"

#include "commvq/core/error.hpp"

#include <utf8proc.h>

namespace engine {

void require_utf8(std::string_view text) {
  const auto* const bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  const auto size = static_cast<utf8proc_ssize_t>(text.size());
  for (utf8proc_ssize_t at = 0; at < size;) {
    utf8proc_int32_t character = 0;
    const utf8proc_ssize_t length = utf8proc_iterate(bytes + at, size - at, &character);
    commvq::require(length > 0, "UTF-8 error: byte ", at, " of the text belongs to no character");
    at += length;
  }
}

}  // namespace engine
