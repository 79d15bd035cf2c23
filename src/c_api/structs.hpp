#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "c_api/guard.hpp"

namespace commvq::c_api {

/// Throws `Error` if a pointer argument is null.
template <class T>
T& deref(T* pointer, const char* name) {
  require(pointer != nullptr, name, " is null");
  return *pointer;
}

inline void check_struct_size(std::size_t size, std::size_t first_version, const char* name) {
  // Larger structs are those of newer headers; the bound catches what is no size at all.
  if (size >= first_version && size <= 4096) return;
  throw StatusError(COMMVQ_WRONG_STRUCT_SIZE, std::string(name) + "::struct_size is " +
                                                  std::to_string(size) + "; it must be sizeof(" +
                                                  name + "), at least " +
                                                  std::to_string(first_version));
}

/// Copies a caller's struct over the defaults of this library's. Throws `StatusError` if its size
/// is none, or if a newer header's field that this library does not know is set.
template <class T>
T read_struct(const T* theirs, T defaults, const char* name) {
  const std::size_t size = deref(theirs, name).struct_size;
  check_struct_size(size, sizeof(T), name);
  const auto* const bytes = reinterpret_cast<const unsigned char*>(theirs);
  if (std::any_of(bytes + std::min(size, sizeof(T)), bytes + size, [](auto b) { return b != 0; }))
    throw StatusError(COMMVQ_WRONG_STRUCT_SIZE,
                      std::string(name) + " sets a field that commvq " + commvq_version() +
                          " does not know: its header is newer than the library");
  std::memcpy(&defaults, theirs, std::min(size, sizeof(T)));
  return defaults;
}

/// Writes this library's struct to a caller's of `size` bytes, which becomes its struct_size; what
/// this library does not know is zero.
template <class T>
void write_struct(T* theirs, std::size_t size, T ours, const char* name) {
  check_struct_size(size, sizeof(T), name);
  deref(theirs, name);
  ours.struct_size = size;
  auto* const bytes = reinterpret_cast<unsigned char*>(theirs);
  std::fill(bytes, bytes + size, static_cast<unsigned char>(0));
  std::memcpy(bytes, &ours, std::min(size, sizeof(T)));
}

}  // namespace commvq::c_api
