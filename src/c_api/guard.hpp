#pragma once

#include <new>
#include <stdexcept>

#include "commvq/c_api.h"
#include "commvq/core/error.hpp"

namespace commvq::c_api {

/// An error that has a status of its own; `Error` alone is COMMVQ_INVALID_ARGUMENT.
class StatusError : public Error {
 public:
  StatusError(commvq_status status, const std::string& message) : Error(message), status_(status) {}
  commvq_status status() const { return status_; }

 private:
  commvq_status status_;
};

/// Keeps `message` for `commvq_last_error` of this thread and returns `status`. Allocates nothing.
commvq_status failed(commvq_status status, const char* message) noexcept;

/// Runs `action`; turns whatever it throws into a status and this thread's last error.
template <class Action>
commvq_status guarded(Action&& action) noexcept {
  try {
    action();
    return COMMVQ_OK;
  } catch (const StatusError& error) {
    return failed(error.status(), error.what());
  } catch (const Error& error) {
    return failed(COMMVQ_INVALID_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return failed(COMMVQ_OUT_OF_MEMORY, "out of memory");
  } catch (const std::length_error&) {
    return failed(COMMVQ_OUT_OF_MEMORY, "more memory is needed than can be addressed");
  } catch (const std::exception& error) {
    return failed(COMMVQ_INTERNAL_ERROR, error.what());
  } catch (...) {
    return failed(COMMVQ_INTERNAL_ERROR, "an unknown exception");
  }
}

/// Runs `action`; an `Error` becomes one of `status`.
template <class Action>
decltype(auto) with_status(commvq_status status, Action&& action) {
  try {
    return action();
  } catch (const Error& error) {
    throw StatusError(status, error.what());
  }
}

}  // namespace commvq::c_api
