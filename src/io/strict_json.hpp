#pragma once

#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace commvq::detail {

/// Parses JSON from an untrusted file. `what` names it in messages. Throws `Error` for malformed
/// text, for a key given twice in one object, and for nesting deeper than `max_depth`.
nlohmann::json parse_strict_json(std::string_view text, int max_depth, const std::string& what);

/// A name from an untrusted file, fit for a message: in quotes, short, printable.
std::string in_quotes(std::string_view name);

}  // namespace commvq::detail
