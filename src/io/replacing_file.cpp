#include "io/replacing_file.hpp"

#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

#include "commvq/core/error.hpp"

#include <unistd.h>

namespace commvq::detail {

ReplacingFile::ReplacingFile(const std::filesystem::path& target, mode_t mode, FileLayer& files)
    : files_(files), target_(target) {
  static std::atomic<unsigned> counter{0};
  do {
    path_ =
        target.string() + ".tmp-" + std::to_string(::getpid()) + "-" + std::to_string(counter++);
    descriptor_ = files_.create(path_.c_str(), mode);
  } while (descriptor_ < 0 && errno == EEXIST);
  check(descriptor_ >= 0);
}

ReplacingFile::~ReplacingFile() {
  if (descriptor_ >= 0) files_.close(descriptor_);
  if (!committed_) files_.remove(path_.c_str());
}

void ReplacingFile::write(const void* data, std::size_t size) {
  const char* next = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = files_.write(descriptor_, next, size);
    if (written < 0 && errno == EINTR) continue;
    if (written == 0) errno = EIO;  // no progress: do not try for ever
    check(written > 0);
    next += written;
    size -= static_cast<std::size_t>(written);
  }
}

void ReplacingFile::commit() {
  check(files_.sync(descriptor_) == 0);
  check(files_.close(std::exchange(descriptor_, -1)) == 0);
  check(files_.rename(path_.c_str(), target_.c_str()) == 0);
  committed_ = true;
  sync_folder();
}

void ReplacingFile::check(bool succeeded) const {
  require(succeeded, target_.string(), ": cannot be written: ", std::strerror(errno));
}

/// Makes the new name survive a power cut; the file is whole without it.
void ReplacingFile::sync_folder() {
  const std::filesystem::path folder = target_.has_parent_path() ? target_.parent_path() : ".";
  const int descriptor = files_.open(folder.c_str());
  if (descriptor < 0) return;
  files_.sync(descriptor);
  files_.close(descriptor);
}

}  // namespace commvq::detail
