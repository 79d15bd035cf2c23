#include <algorithm>
#include <functional>
#include <utility>

#include "commvq/io/safetensors.hpp"

#include "io/replacing_file.hpp"
#include "strict_json.hpp"
#include "tensor_size.hpp"

namespace commvq {
namespace {

using detail::in_quotes;
using nlohmann::json;

constexpr std::size_t kMaxHeaderBytes = 100'000'000;
constexpr std::size_t kAlignment = 8;  // of the data, and so of every tensor: the widest come first

std::string header_text(const json& header, const std::filesystem::path& path) {
  std::string text;
  try {
    text = header.dump();
  } catch (const json::exception&) {
    fail(path.string(), ": a tensor name or metadata is not valid UTF-8");
  }
  text.resize((text.size() + kAlignment - 1) / kAlignment * kAlignment, ' ');
  require(text.size() <= kMaxHeaderBytes, path.string(), ": header of ", text.size(),
          " bytes; the format allows ", kMaxHeaderBytes);
  return text;
}

}  // namespace

void SafetensorsWriter::add(const std::string& name, const std::vector<Index>& shape,
                            std::span<const float> values) {
  add(name, Dtype::kF32, shape,
      {reinterpret_cast<const std::uint8_t*>(values.data()), values.size_bytes()});
}

void SafetensorsWriter::add(const std::string& name, Dtype dtype, const std::vector<Index>& shape,
                            std::span<const std::uint8_t> bytes) {
  const std::string what = "tensor " + in_quotes(name);
  require(name != "__metadata__", what, ": the format reserves this name");
  require(!entries_.contains(name), what, ": added twice");
  const Index needed = detail::checked_bytes(dtype, shape, what);
  require(needed == static_cast<Index>(bytes.size()), what, ": shape ", detail::to_text(shape),
          " of ", name_of(dtype), " needs ", needed, " bytes, not ", bytes.size());
  entries_[name] = {dtype, shape, {bytes.begin(), bytes.end()}};
}

void SafetensorsWriter::set_metadata(const std::string& key, const std::string& value) {
  metadata_[key] = value;
}

void SafetensorsWriter::write(const std::filesystem::path& path) const {
  write(path, detail::system_files());
}

void SafetensorsWriter::write(const std::filesystem::path& path, detail::FileLayer& files) const {
  std::vector<const std::pair<const std::string, Entry>*> order;
  for (const auto& entry : entries_) order.push_back(&entry);
  std::ranges::stable_sort(order, std::greater(),
                           [](const auto* entry) { return size_of(entry->second.dtype); });

  json header = json::object();
  if (!metadata_.empty()) header["__metadata__"] = metadata_;
  std::size_t offset = 0;
  for (const auto* const item : order) {
    const auto& [name, entry] = *item;
    const std::size_t end = offset + entry.bytes.size();
    header[name] = {
        {"dtype", name_of(entry.dtype)}, {"shape", entry.shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }

  const std::string text = header_text(header, path);
  const std::uint64_t length = text.size();
  detail::ReplacingFile file(path, 0666, files);
  file.write(&length, sizeof(length));
  file.write(text.data(), text.size());
  for (const auto* const item : order)
    file.write(item->second.bytes.data(), item->second.bytes.size());
  file.commit();
}

}  // namespace commvq
