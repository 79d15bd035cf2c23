#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

#include "commvq/core/view.hpp"

#include "io/file_layer.hpp"

namespace commvq::detail {

/// A regular file that is read from the front. Members throw `Error` naming the file.
class InputFile {
 public:
  InputFile(const std::filesystem::path& path, FileLayer& files);
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;
  ~InputFile();

  /// Bytes of the file when it was opened.
  Index size() const { return size_; }
  /// The path, for messages.
  const std::string& where() const { return where_; }
  /// Fills `bytes`.
  void read(std::span<std::uint8_t> bytes);

 private:
  FileLayer& files_;
  std::string where_;
  int descriptor_;
  Index size_ = 0;
  Index position_ = 0;
};

}  // namespace commvq::detail
