#include "strict_json.hpp"

#include <set>
#include <vector>

#include "commvq/core/error.hpp"

namespace commvq::detail {
namespace {

using nlohmann::json;

/// Follows the parser's events; one set of keys per open object or array.
class StructureGuard {
 public:
  StructureGuard(int max_depth, const std::string& what) : max_depth_(max_depth), what_(what) {}

  void on_event(json::parse_event_t event, const json& parsed) {
    switch (event) {
      case json::parse_event_t::object_start:
      case json::parse_event_t::array_start:
        require(static_cast<int>(keys_.size()) < max_depth_, what_, ": JSON is nested deeper than ",
                max_depth_, " levels");
        keys_.emplace_back();
        break;
      case json::parse_event_t::object_end:
      case json::parse_event_t::array_end:
        keys_.pop_back();
        break;
      case json::parse_event_t::key: {
        const auto& key = parsed.get_ref<const std::string&>();
        require(keys_.back().insert(key).second, what_, ": key ", in_quotes(key),
                " is given twice");
        break;
      }
      case json::parse_event_t::value:
        break;
    }
  }

 private:
  int max_depth_;
  const std::string& what_;
  std::vector<std::set<std::string>> keys_;
};

}  // namespace

json parse_strict_json(std::string_view text, int max_depth, const std::string& what) {
  // The parser would take a NUL for the end of the text and not look at what follows.
  const std::size_t nul = text.find('\0');
  require(nul == text.npos, what, ": not valid JSON at byte ", nul + 1, " of ", text.size());
  StructureGuard guard(max_depth, what);
  const auto observe = [&guard](int, json::parse_event_t event, json& parsed) {
    guard.on_event(event, parsed);
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), observe);
  } catch (const json::parse_error& error) {
    fail(what, ": not valid JSON at byte ", error.byte, " of ", text.size());
  } catch (const json::exception& error) {
    fail(what, ": JSON cannot be read: ", in_quotes(error.what()));
  }
}

std::string in_quotes(std::string_view name) {
  constexpr std::size_t kLongest = 120;
  std::string text = "\"";
  for (const char c : name.substr(0, kLongest)) {
    const bool printable = static_cast<unsigned char>(c) >= 0x20 && c != 0x7f;
    text += printable ? c : '?';
  }
  return text + (name.size() > kLongest ? "...\"" : "\"");
}

}  // namespace commvq::detail
