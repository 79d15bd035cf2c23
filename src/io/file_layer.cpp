#include "io/file_layer.hpp"

#include <cstdio>

#include <fcntl.h>
#include <unistd.h>

namespace commvq::detail {

int FileLayer::create(const char* path, mode_t mode) {
  return ::open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
}

int FileLayer::open(const char* path) {
  // O_NONBLOCK: a named pipe must not make us wait for its writer.
  return ::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
}

int FileLayer::status(int descriptor, struct stat* status) {
  return ::fstat(descriptor, status);
}

ssize_t FileLayer::write(int descriptor, const void* data, std::size_t size) {
  return ::write(descriptor, data, size);
}

ssize_t FileLayer::read(int descriptor, void* data, std::size_t size) {
  return ::read(descriptor, data, size);
}

int FileLayer::sync(int descriptor) {
  return ::fsync(descriptor);
}

int FileLayer::close(int descriptor) {
  return ::close(descriptor);
}

int FileLayer::rename(const char* from, const char* to) {
  return std::rename(from, to);
}

int FileLayer::remove(const char* path) {
  return ::unlink(path);
}

FileLayer& system_files() {
  static FileLayer files;
  return files;
}

}  // namespace commvq::detail
