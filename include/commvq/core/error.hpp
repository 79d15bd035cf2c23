#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "commvq/core/export.h"

namespace commvq {

/// The one exception type of the library. Its message names the offending value, the limit it broke
/// and, where there is one, what to do about it.
class COMMVQ_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Throws `Error` with all parts streamed into one message.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

/// Throws `Error` built from `parts` unless `condition` holds.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

}  // namespace commvq
