#include "engine/tokenizer/fields.hpp"

#include <cstdint>

#include "commvq/core/error.hpp"

#include <nlohmann/json.hpp>

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
  require(value.is_string(), "tokenizer.json: ", name, " is ", value.dump(),
          "; it must be a string");
  return value.get<std::string>();
}

bool flag(const Json& object, const char* name, bool otherwise) {
  if (is_absent(object, name)) return otherwise;
  require(object[name].is_boolean(), "tokenizer.json: ", name, " is ", object[name].dump(),
          "; it must be true or false");
  return object[name].get<bool>();
}

int id_of(const Json& value) {
  require(value.is_number_integer(), "tokenizer.json: a token id is ", value.dump());
  const auto id = value.get<std::int64_t>();
  require(id >= 0 && id < (1 << 24), "tokenizer.json: a token id is ", id,
          "; it must be in [0, 16777215]");
  return static_cast<int>(id);
}

}  // namespace engine
