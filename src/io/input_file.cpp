#include "io/input_file.hpp"

#include <cerrno>
#include <cstring>

namespace commvq::detail {
namespace {

Index size_of_regular(int descriptor, FileLayer& files, const std::string& where) {
  struct stat status {};
  require(files.status(descriptor, &status) == 0, where, ": ", std::strerror(errno));
  require(S_ISREG(status.st_mode), where, ": not a regular file");
  return status.st_size;
}

}  // namespace

InputFile::InputFile(const std::filesystem::path& path, FileLayer& files)
    : files_(files), where_(path.string()), descriptor_(files.open(path.c_str())) {
  require(descriptor_ >= 0, where_, ": cannot be opened: ", std::strerror(errno));
  try {
    size_ = size_of_regular(descriptor_, files, where_);
  } catch (...) {
    files_.close(descriptor_);
    throw;
  }
}

InputFile::~InputFile() {
  files_.close(descriptor_);
}

void InputFile::read(std::span<std::uint8_t> bytes) {
  while (!bytes.empty()) {
    const ssize_t count = files_.read(descriptor_, bytes.data(), bytes.size());
    if (count < 0 && errno == EINTR) continue;
    require(count >= 0, where_, ": cannot be read at byte ", position_, ": ", std::strerror(errno));
    require(count > 0, where_, ": ends at byte ", position_, " of ", size_,
            ": it was cut short while it was read");
    bytes = bytes.subspan(static_cast<std::size_t>(count));
    position_ += count;
  }
}

}  // namespace commvq::detail
