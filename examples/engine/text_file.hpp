#pragma once

#include <filesystem>
#include <string>

namespace engine {

/// The whole content of a file. Throws `commvq::Error` with the path and the reason.
std::string read_text_file(const std::filesystem::path& path);

/// Writes a file that appears at once, complete, in the place of an older one. Throws
/// `commvq::Error` with the path.
void write_text_file(const std::filesystem::path& path, const std::string& text);

}  // namespace engine
