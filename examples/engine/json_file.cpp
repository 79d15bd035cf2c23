#include "engine/json_file.hpp"

#include "commvq/core/error.hpp"

#include "engine/text_file.hpp"

namespace engine {
namespace {

using Json = nlohmann::json;

constexpr std::size_t kMaxBytes = 100'000'000;
constexpr int kMaxDepth = 64;

}  // namespace

std::string read_json_text(const std::filesystem::path& path) {
  std::error_code unknown;
  const auto size = std::filesystem::file_size(path, unknown);
  commvq::require(unknown || size <= kMaxBytes, path.string(), ": ", size, " bytes; the limit is ",
                  kMaxBytes);
  return read_text_file(path);
}

Json parse_json(std::string_view text, const std::filesystem::path& path) {
  // Whoever walks the tree does so by recursion.
  const auto check_depth = [&](int depth, Json::parse_event_t, const Json&) {
    commvq::require(depth <= kMaxDepth, path.string(), ": JSON is nested deeper than ", kMaxDepth,
                    " levels");
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), check_depth);
  } catch (const Json::parse_error& error) {
    commvq::fail(path.string(), ": not valid JSON at byte ", error.byte, " of ", text.size());
  } catch (const Json::exception& error) {
    commvq::fail(path.string(), ": JSON cannot be read: ", printable(error.what()));
  }
}

std::string shown(const Json& value) {
  return printable(value.dump());
}

std::string printable(std::string_view text) {
  constexpr std::size_t kLongest = 120;
  std::string result(text.substr(0, kLongest));
  for (char& c : result)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  return text.size() > kLongest ? result + "..." : result;
}

}  // namespace engine
