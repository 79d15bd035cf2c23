#pragma once

#include <string>

#include <nlohmann/json_fwd.hpp>

/// Fields of a `tokenizer.json`. All throw `commvq::Error` that names the field and its value.
namespace engine {

using Json = nlohmann::json;

/// A field that must exist.
const Json& field(const Json& object, const char* name);
/// True if the field is absent or null.
bool is_absent(const Json& object, const char* name);
std::string text_of(const Json& object, const char* name);
/// `otherwise` where the field is absent or null.
bool flag(const Json& object, const char* name, bool otherwise);
/// A token id: a whole number in [0, 2^24).
int id_of(const Json& value);

}  // namespace engine
