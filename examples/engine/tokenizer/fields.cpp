#include "engine/tokenizer/fields.hpp"

#include <algorithm>

#include "commvq/core/error.hpp"

#include "engine/json_file.hpp"

namespace engine {

using commvq::require;

const Json& field(const Json& object, const char* name) {
  require(object.is_object() && object.contains(name), "tokenizer.json: no field ", name);
  return object[name];
}

bool is_absent(const Json& object, const char* name) {
  return !object.is_object() || !object.contains(name) || object[name].is_null();
}

std::string text_of(const Json& object, const char* name) {
  const Json& value = field(object, name);
  require(value.is_string(), "tokenizer.json: ", name, " is ", shown(value),
          "; it must be a string");
  return value.get<std::string>();
}

bool flag(const Json& object, const char* name, bool otherwise) {
  if (is_absent(object, name)) return otherwise;
  require(object[name].is_boolean(), "tokenizer.json: ", name, " is ", shown(object[name]),
          "; it must be true or false");
  return object[name].get<bool>();
}

const Json& list(const Json& object, const char* name) {
  const Json& value = field(object, name);
  require(value.is_array(), "tokenizer.json: ", name, " is ", shown(value), "; it must be a list");
  return value;
}

int id_of(const Json& value, std::size_t file_bytes) {
  const std::size_t limit = std::min<std::size_t>(file_bytes, 1 << 24);
  require(value.is_number_integer() && value >= 0 && value < limit,
          "tokenizer.json: a token id is ", shown(value), "; in a file of ", file_bytes,
          " bytes it must be in [0, ", limit - 1, "]");
  return value.get<int>();
}

}  // namespace engine
