#pragma once

#include <cstdint>
#include <cstdio>
#include <span>
#include <string>

namespace engine {

/// 64-bit FNV-1a, to tell models and texts apart.
class Hash {
 public:
  void add(std::span<const std::uint8_t> bytes) {
    for (const std::uint8_t byte : bytes) state_ = (state_ ^ byte) * 0x100000001b3ULL;
  }
  void add(const std::string& text) {
    add({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
  }
  /// Numbers as they lie in memory.
  template <class Number>
  void add_numbers(std::span<const Number> numbers) {
    add({reinterpret_cast<const std::uint8_t*>(numbers.data()), numbers.size_bytes()});
  }
  /// 16 hexadecimal digits.
  std::string text() const {
    char digits[17];
    std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(state_));
    return digits;
  }

 private:
  std::uint64_t state_ = 0xcbf29ce484222325ULL;
};

}  // namespace engine
