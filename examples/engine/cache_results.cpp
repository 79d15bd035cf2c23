#include "engine/cache_results.hpp"

#include <fstream>

#include "commvq/core/error.hpp"

#include <nlohmann/json.hpp>

#include "engine/text_file.hpp"

namespace engine {

std::optional<CacheResults> load_results(const std::filesystem::path& path,
                                         const std::string& key) {
  if (!std::filesystem::exists(path)) return std::nullopt;
  CacheResults results;
  try {
    const auto json = nlohmann::json::parse(read_text_file(path));
    if (json.at("key") != key) return std::nullopt;
    for (const auto& context : json.at("contexts"))
      results.predictions.push_back({context.at("nll"), context.at("best")});
    results.retrieved = json.at("retrieved").get<std::vector<char>>();
    results.allocated_bytes = json.at("allocated_bytes");
  } catch (const nlohmann::json::exception& error) {
    commvq::fail(path.string(), " does not hold results of a cache (", error.what(),
                 "); remove it");
  }
  return results;
}

void save_results(const std::filesystem::path& path, const std::string& key,
                  const CacheResults& results) {
  nlohmann::json contexts = nlohmann::json::array();
  for (const Predictions& context : results.predictions)
    contexts.push_back({{"nll", context.nll}, {"best", context.best}});
  write_text_file(path, nlohmann::json{{"key", key},
                                       {"contexts", contexts},
                                       {"retrieved", results.retrieved},
                                       {"allocated_bytes", results.allocated_bytes}}
                            .dump());
}

}  // namespace engine
