#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <span>
#include <string>

#include <unistd.h>

#include "fuzz/harness.hpp"

namespace commvq::fuzz {

/// The name of a file in a folder of this process, gone when the process ends in good order.
/// Harnesses write each input to it: the readers under test take paths.
class InputFile {
 public:
  explicit InputFile(const std::string& name)
      : folder_(std::filesystem::temp_directory_path() /
                ("commvq_fuzz_" + name + "_" + std::to_string(::getpid()))),
        path_(folder_ / name) {
    std::filesystem::create_directories(folder_);
  }
  ~InputFile() {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  const std::filesystem::path& folder() const { return folder_; }
  const std::filesystem::path& path() const { return path_; }

  void write(std::span<const std::uint8_t> bytes) const {
    std::FILE* const file = std::fopen(path_.c_str(), "wb");
    const bool written =
        file != nullptr && std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size();
    if (file == nullptr || std::fclose(file) != 0 || !written) {
      std::perror(path_.c_str());
      std::exit(1);  // the machine's fault, not a finding
    }
  }

 private:
  std::filesystem::path folder_, path_;
};

inline std::string bytes_of(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace commvq::fuzz
