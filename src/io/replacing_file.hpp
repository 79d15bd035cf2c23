#pragma once

#include <filesystem>
#include <string>

#include "io/file_layer.hpp"

namespace commvq::detail {

/// A new file beside `target` that takes its place on `commit` and is removed otherwise. Whatever
/// fails and whenever the process ends, `target` is the old file or the new one, each whole.
/// Members throw `Error` with the system's reason.
class ReplacingFile {
 public:
  /// `mode` are the permissions of the new file, from which the process's umask takes away.
  ReplacingFile(const std::filesystem::path& target, mode_t mode, FileLayer& files);
  ReplacingFile(const ReplacingFile&) = delete;
  ReplacingFile& operator=(const ReplacingFile&) = delete;
  ~ReplacingFile();

  void write(const void* data, std::size_t size);
  /// Waits until the bytes are on the disk, then renames.
  void commit();

 private:
  void check(bool succeeded) const;
  void sync_folder();

  FileLayer& files_;
  std::filesystem::path target_;
  std::string path_;
  int descriptor_ = -1;
  bool committed_ = false;
};

}  // namespace commvq::detail
