#include "engine/text_file.hpp"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>

#include "commvq/core/error.hpp"

#include <unistd.h>

namespace engine {

std::string read_text_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  commvq::require(file.good(), "cannot open ", path.string(), ": ", std::strerror(errno));
  commvq::require(!std::filesystem::is_directory(path), path.string(),
                  " is a folder; a file is needed");
  std::ostringstream text;
  text << file.rdbuf();
  commvq::require(!file.bad(), "cannot read ", path.string(), ": ", std::strerror(errno));
  return text.str();
}

void write_text_file(const std::filesystem::path& path, const std::string& text) {
  std::filesystem::path begun = path;
  begun += ".begun-" + std::to_string(getpid());
  {
    std::ofstream file(begun, std::ios::binary);
    file << text;
    commvq::require(file.flush().good(), "cannot write ", begun.string());
  }
  std::filesystem::rename(begun, path);
}

}  // namespace engine
