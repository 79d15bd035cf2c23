#pragma once

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include <gtest/gtest.h>
#include <unistd.h>

/// Where tests find the models that come with the project, and a folder to write in.
namespace commvq::testing_support {

inline std::filesystem::path small_model() {
  return std::filesystem::path(COMMVQ_EXAMPLE_DATA) / "lm-7m";
}

/// Files that scripts in tests/data wrote.
inline std::filesystem::path test_data() {
  return COMMVQ_TEST_DATA;
}

/// Larger models and texts that may lie beside the source tree; tests skip where they do not.
inline std::filesystem::path shared_data() {
  return std::filesystem::path(COMMVQ_EXAMPLE_DATA).parent_path().parent_path().parent_path() /
         "shared";
}

inline std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

inline void write_file(const std::filesystem::path& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  ASSERT_TRUE(file.good()) << path;
}

/// An empty folder of its own, removed at the end of its life.
class TemporaryFolder {
 public:
  explicit TemporaryFolder(const std::string& name) {
    static int count = 0;
    path_ = std::filesystem::temp_directory_path() /
            ("commvq_" + name + "_" + std::to_string(getpid()) + "_" + std::to_string(count++));
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace commvq::testing_support
