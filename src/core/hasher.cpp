#include "core/hasher.hpp"

#include <cstring>
#include <new>

// All of the library's code comes from its header: nothing is left to link with.
#define XXH_INLINE_ALL
#include <xxhash.h>

namespace commvq {

std::string Digest::to_text() const {
  constexpr const char* kDigits = "0123456789abcdef";
  std::string text;
  for (const std::uint8_t byte : bytes) {
    text += kDigits[byte / 16];
    text += kDigits[byte % 16];
  }
  return text;
}

namespace detail {

struct Hasher::State {
  XXH3_state_t xxh3;
};

Hasher::Hasher() : state_(std::make_unique<State>()) {
  XXH3_INITSTATE(&state_->xxh3);
  XXH3_128bits_reset(&state_->xxh3);
}

Hasher::~Hasher() = default;

void Hasher::add(std::span<const std::uint8_t> bytes) {
  XXH3_128bits_update(&state_->xxh3, bytes.data(), bytes.size());
}

void Hasher::add(std::string_view text) {
  XXH3_128bits_update(&state_->xxh3, text.data(), text.size());
}

void Hasher::add(std::span<const float> values) {
  XXH3_128bits_update(&state_->xxh3, values.data(), values.size_bytes());
}

void Hasher::add(Index number) {
  XXH3_128bits_update(&state_->xxh3, &number, sizeof number);
}

Digest Hasher::digest() const {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(&state_->xxh3));
  Digest result;
  static_assert(sizeof canonical.digest == sizeof result.bytes);
  std::memcpy(result.bytes.data(), canonical.digest, sizeof canonical.digest);
  return result;
}

}  // namespace detail
}  // namespace commvq
