#pragma once

#include <cstdarg>
#include <cstdio>

namespace commvq::cuda {

enum class StatusCode {
  kOk,
  kInvalidArgument,  ///< a value is out of its documented range
  kUnsupported,      ///< valid, but no kernel computes it; the message says what is supported
  kWorkspaceTooSmall,
  kCudaError,  ///< the CUDA runtime refused a launch; the message holds its reason
};

/// What a call that must not throw says of itself. The message names the offending value, the limit
/// and what to do; it lives inside the object, so nothing is allocated.
class [[nodiscard]] Status {
 public:
  Status() noexcept { message_[0] = '\0'; }
  /// `format` and its arguments as for printf; longer messages are cut at 255 characters.
  [[gnu::format(printf, 3, 4)]] Status(StatusCode code, const char* format, ...) noexcept
      : code_(code) {
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message_, sizeof message_, format, arguments);
    va_end(arguments);
  }

  bool ok() const noexcept { return code_ == StatusCode::kOk; }
  StatusCode code() const noexcept { return code_; }
  /// Empty for kOk.
  const char* message() const noexcept { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  char message_[256];
};

}  // namespace commvq::cuda
