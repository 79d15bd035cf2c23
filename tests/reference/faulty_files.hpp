#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <limits>
#include <string>

#include "io/file_layer.hpp"

namespace commvq::testing_support {

/// The system's files with faults: a byte that cannot be written or read, calls that fail, calls
/// that do less than they were asked for.
class FaultyFiles : public detail::FileLayer {
 public:
  static constexpr std::size_t kNever = std::numeric_limits<std::size_t>::max();

  std::size_t bytes_until_fault = kNever;  ///< so many bytes are still written, or read
  std::string failing_call;                ///< "create", "open", "sync", "close" or "rename"
  int error = EIO;                         ///< of the fault
  /// The fault is the end of the process: nothing happens any more, not even tidying up.
  bool dies = false;
  std::size_t longest_transfer = kNever;  ///< reads and writes do at most so many bytes at once
  bool interrupts = false;                ///< every second read and write fails with EINTR

  int create(const char* path, mode_t mode) override {
    return fails("create") ? -1 : FileLayer::create(path, mode);
  }
  int open(const char* path) override { return fails("open") ? -1 : FileLayer::open(path); }
  ssize_t write(int descriptor, const void* data, std::size_t size) override {
    const std::size_t allowed = transfer(size);
    return allowed == 0 ? -1 : FileLayer::write(descriptor, data, allowed);
  }
  ssize_t read(int descriptor, void* data, std::size_t size) override {
    const std::size_t allowed = transfer(size);
    return allowed == 0 ? -1 : FileLayer::read(descriptor, data, allowed);
  }
  int sync(int descriptor) override { return fails("sync") ? -1 : FileLayer::sync(descriptor); }
  int close(int descriptor) override {
    // A descriptor is given up in any case, as the system does.
    const int result = FileLayer::close(descriptor);
    return fails("close") ? -1 : result;
  }
  int rename(const char* from, const char* to) override {
    return fails("rename") ? -1 : FileLayer::rename(from, to);
  }
  int remove(const char* path) override { return dead_ ? -1 : FileLayer::remove(path); }

 private:
  bool fails(const char* call) {
    if (!dead_ && failing_call != call) return false;
    fault();
    return true;
  }
  void fault() {
    dead_ = dead_ || dies;
    errno = error;
  }
  /// How much of a transfer takes place; 0, and errno, for none.
  std::size_t transfer(std::size_t size) {
    if (interrupts && (interrupted_ = !interrupted_)) {
      errno = EINTR;
      return 0;
    }
    const std::size_t allowed = std::min({size, longest_transfer, bytes_until_fault});
    if (dead_ || allowed == 0) {
      fault();
      return 0;
    }
    if (bytes_until_fault != kNever) bytes_until_fault -= allowed;
    return allowed;
  }

  bool dead_ = false;
  bool interrupted_ = false;
};

/// Every path is one file in memory, which can only be read: for many small changes to a file,
/// without waiting for a disk.
class MemoryFile : public detail::FileLayer {
 public:
  std::string bytes;

  int open(const char*) override {
    position_ = 0;
    return kDescriptor;
  }
  int status(int, struct stat* status) override {
    status->st_mode = S_IFREG;
    status->st_size = static_cast<off_t>(bytes.size());
    return 0;
  }
  ssize_t read(int, void* data, std::size_t size) override {
    const std::size_t count = bytes.copy(static_cast<char*>(data), size, position_);
    position_ += count;
    return static_cast<ssize_t>(count);
  }
  int close(int) override { return 0; }

 private:
  static constexpr int kDescriptor = 1 << 30;  // none of the system's
  std::size_t position_ = 0;
};

}  // namespace commvq::testing_support
