#pragma once

#include <filesystem>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace engine {

/// The text of a JSON file of a model, which may be anybody's. Throws `commvq::Error` with the path
/// for more than 100 MB.
std::string read_json_text(const std::filesystem::path& path);

/// Parses what was read from `path`. Throws `commvq::Error` for malformed text and for nesting
/// deeper than any such file's.
nlohmann::json parse_json(std::string_view text, const std::filesystem::path& path);

/// A value or a name from an untrusted file, fit for a message: short and printable.
std::string shown(const nlohmann::json& value);
std::string printable(std::string_view text);

}  // namespace engine
