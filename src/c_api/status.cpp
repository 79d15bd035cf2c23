#include <cstdio>

#include "c_api/guard.hpp"

namespace commvq::c_api {
namespace {

thread_local char last_error[1024] = "";

}  // namespace

commvq_status failed(commvq_status status, const char* message) noexcept {
  std::snprintf(last_error, sizeof last_error, "%s", message);
  return status;
}

}  // namespace commvq::c_api

const char* commvq_last_error(void) {
  return commvq::c_api::last_error;
}

const char* commvq_version(void) {
  return COMMVQ_VERSION;
}

const char* commvq_status_name(commvq_status status) {
  switch (status) {
    case COMMVQ_OK:
      return "COMMVQ_OK";
    case COMMVQ_INVALID_ARGUMENT:
      return "COMMVQ_INVALID_ARGUMENT";
    case COMMVQ_WRONG_STRUCT_SIZE:
      return "COMMVQ_WRONG_STRUCT_SIZE";
    case COMMVQ_BAD_FILE:
      return "COMMVQ_BAD_FILE";
    case COMMVQ_WRONG_MODEL:
      return "COMMVQ_WRONG_MODEL";
    case COMMVQ_UNSUPPORTED:
      return "COMMVQ_UNSUPPORTED";
    case COMMVQ_OUT_OF_MEMORY:
      return "COMMVQ_OUT_OF_MEMORY";
    case COMMVQ_INTERNAL_ERROR:
      return "COMMVQ_INTERNAL_ERROR";
    default:
      return "unknown";
  }
}
