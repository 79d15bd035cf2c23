#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "engine/evaluation.hpp"

namespace engine {

/// What came of an evaluation of one cache.
struct CacheResults {
  std::vector<Predictions> predictions;  ///< of every context
  std::vector<char> retrieved;           ///< of every question: 1 where it was answered
  Index allocated_bytes = 0;             ///< after one context
};

/// Reads results that were saved with the same `key`, which names the model, the text and the
/// options; nothing if there is no such file or its key is another. Throws `commvq::Error` for a
/// file that holds no results.
std::optional<CacheResults> load_results(const std::filesystem::path& path, const std::string& key);

/// Writes a file that appears at once, complete.
void save_results(const std::filesystem::path& path, const std::string& key,
                  const CacheResults& results);

}  // namespace engine
