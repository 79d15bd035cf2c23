#pragma once

#include <cstddef>
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
/// A field that is a list.
const Json& list(const Json& object, const char* name);
/// A token id of a file of `file_bytes`: tables by id must not outgrow the file.
int id_of(const Json& value, std::size_t file_bytes);

}  // namespace engine
