#include <algorithm>
#include <fstream>
#include <system_error>

#include "commvq/io/safetensors.hpp"

#include "strict_json.hpp"

namespace commvq {
namespace {

using detail::in_quotes;
using nlohmann::json;

constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";
constexpr std::uintmax_t kMaxIndexBytes = 100'000'000;
constexpr int kMaxIndexDepth = 8;

std::string read_index(const std::filesystem::path& path) {
  std::error_code reason;
  const auto size = std::filesystem::file_size(path, reason);
  require(!reason, path.string(), ": cannot be read: ", reason.message());
  require(size <= kMaxIndexBytes, path.string(), ": ", size, " bytes; the limit is ",
          kMaxIndexBytes);
  std::ifstream file(path, std::ios::binary);
  std::string text(static_cast<std::size_t>(size), '\0');
  file.read(text.data(), static_cast<std::streamsize>(size));
  require(file.good(), path.string(), ": cannot be read");
  return text;
}

/// A shard is a file of the folder itself: a path in the index could read any file of the machine.
void require_plain_name(const std::string& shard, const std::filesystem::path& index) {
  // Control characters would also reach whoever reads the error of a file that is not there.
  const auto is_strange = [](unsigned char c) {
    return c < 0x20 || c == 0x7f || c == '/' || c == '\\';
  };
  // A longer name is no file's and would fill the error of whoever tries to open it.
  constexpr std::size_t kLongestName = 255;
  const bool plain = !shard.empty() && shard.size() <= kLongestName && shard != "." &&
                     shard != ".." && std::none_of(shard.begin(), shard.end(), is_strange);
  require(plain, index.string(), ": shard ", in_quotes(shard),
          " is not the plain name of a file beside the index");
}

/// Tensor name to shard name.
std::map<std::string, std::string> read_weight_map(const std::filesystem::path& index) {
  const json root = detail::parse_strict_json(read_index(index), kMaxIndexDepth, index.string());
  require(root.is_object() && root.contains("weight_map") && root["weight_map"].is_object(),
          index.string(), ": weight_map, an object from tensor to shard, is missing");
  std::map<std::string, std::string> weight_map;
  for (const auto& [tensor, shard] : root["weight_map"].items()) {
    require(shard.is_string(), index.string(), ": shard of tensor ", in_quotes(tensor),
            " is not a string");
    require_plain_name(shard.get<std::string>(), index);
    weight_map[tensor] = shard.get<std::string>();
  }
  require(!weight_map.empty(), index.string(), ": weight_map names no tensor");
  return weight_map;
}

}  // namespace

Checkpoint::Checkpoint(const std::filesystem::path& folder) : folder_(folder) {
  std::error_code ignored;
  if (std::filesystem::exists(folder / kSingleFile, ignored)) {
    shards_.emplace_back(folder / kSingleFile);
    for (const auto& [name, tensor] : shards_.front().tensors()) location_[name] = 0;
    return;
  }
  const std::filesystem::path index = folder / kIndexFile;
  require(std::filesystem::exists(index, ignored), folder.string(), ": holds neither ", kSingleFile,
          " nor ", kIndexFile);
  std::map<std::string, std::size_t> shard_numbers;
  for (const auto& [tensor, shard] : read_weight_map(index)) {
    const auto [number, is_new] = shard_numbers.emplace(shard, shards_.size());
    if (is_new) shards_.emplace_back(folder / shard);
    require(shards_[number->second].contains(tensor), index.string(), ": tensor ",
            in_quotes(tensor), " is said to be in ", in_quotes(shard), ", which lacks it");
    location_[tensor] = number->second;
  }
}

const TensorView& Checkpoint::at(const std::string& name) const {
  const auto found = location_.find(name);
  require(found != location_.end(), folder_.string(), ": the checkpoint holds no tensor ",
          in_quotes(name));
  return shards_[found->second].at(name);
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  for (const auto& [name, shard] : location_) names.push_back(name);
  return names;
}

}  // namespace commvq
