#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "commvq/core/export.h"

namespace commvq {

/// A fingerprint of bytes: XXH3 of 128 bits, in the order in which `xxh128sum` prints it. It tells
/// data apart and finds damage; it does not withstand somebody who looks for two inputs with the
/// same digest. All zeros stand for nothing.
struct COMMVQ_API Digest {
  std::array<std::uint8_t, 16> bytes{};

  bool operator==(const Digest&) const = default;
  /// 32 hexadecimal digits.
  std::string to_text() const;
};

}  // namespace commvq
