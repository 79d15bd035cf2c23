#pragma once

#include <cstddef>

#include <sys/stat.h>
#include <sys/types.h>

namespace commvq::detail {

/// The system calls by which files are read and replaced. They return what the calls return, -1 and
/// errno if they fail; tests derive from this to make each of them fail.
class FileLayer {
 public:
  virtual ~FileLayer() = default;
  /// A new file for writing; fails with EEXIST if there is one.
  virtual int create(const char* path, mode_t mode);
  virtual int open(const char* path);
  virtual int status(int descriptor, struct stat* status);
  virtual ssize_t write(int descriptor, const void* data, std::size_t size);
  virtual ssize_t read(int descriptor, void* data, std::size_t size);
  virtual int sync(int descriptor);
  virtual int close(int descriptor);
  virtual int rename(const char* from, const char* to);
  virtual int remove(const char* path);
};

/// The operating system's files.
FileLayer& system_files();

}  // namespace commvq::detail
