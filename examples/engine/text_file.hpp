#pragma once

#include <filesystem>
#include <string>

namespace engine {

/// The whole content of a file. Throws `commvq::Error` with the path and the reason.
std::string read_text_file(const std::filesystem::path& path);

}  // namespace engine
