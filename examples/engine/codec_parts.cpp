#include "engine/codec_parts.hpp"

#include <charconv>
#include <map>
#include <sstream>
#include <system_error>
#include <utility>

#include "commvq/core/error.hpp"

namespace engine {
namespace {

bool holds(const commvq::LayerCodec& layer) {
  return layer.keys != nullptr || layer.values != nullptr;
}

/// The words of a provenance, "name=value", by name; other words stand for themselves.
std::map<std::string, std::string> words_of(const std::string& provenance) {
  std::map<std::string, std::string> words;
  std::istringstream stream(provenance);
  for (std::string word; stream >> word;) words[word.substr(0, word.find('='))] = word;
  return words;
}

/// "seed=1 and seed=2, ..." of two provenances.
std::string difference(const std::string& one, const std::string& other) {
  auto these = words_of(one), those = words_of(other);
  for (const auto& [name, word] : those) these.try_emplace(name, name + " absent");
  std::string text;
  for (const auto& [name, word] : these) {
    const std::string& counterpart = those.try_emplace(name, name + " absent").first->second;
    if (word == counterpart) continue;
    if (!text.empty()) text += ", ";
    text.append(word).append(" and ").append(counterpart);
  }
  return text;
}

}  // namespace

LayerRange LayerRange::parse(const std::string& text, int num_layers) {
  LayerRange range{-1, -1};
  const char* const end = text.data() + text.size();
  const auto first = std::from_chars(text.data(), end, range.begin);
  if (first.ptr != end && *first.ptr == ':') {
    const auto second = std::from_chars(first.ptr + 1, end, range.end);
    if (second.ptr != end) range.end = -1;
  }
  commvq::require(range.begin >= 0 && range.begin < range.end && range.end <= num_layers,
                  "layers are \"", text, "\"; give A:B with 0 <= A < B <= ", num_layers,
                  ", from layer A up to B, which is left out");
  return range;
}

void require_same_calibration(const CodecPart& one, const CodecPart& other) {
  const commvq::ModelCodecs &a = one.codecs, &b = other.codecs;
  const std::string both = one.path.string() + " and " + other.path.string();
  commvq::require(a.model_digest == b.model_digest, both, " belong to different models, ",
                  a.model_digest, " and ", b.model_digest);
  commvq::require(a.layers.size() == b.layers.size(), both, " are for ", a.layers.size(), " and ",
                  b.layers.size(), " layers");
  commvq::require(a.rope == b.rope && a.num_kv_heads == b.num_kv_heads, both,
                  " are for different RoPE or numbers of KV heads (", a.num_kv_heads, " and ",
                  b.num_kv_heads, ")");
  commvq::require(a.provenance == b.provenance, both,
                  " come from different calibrations: ", difference(a.provenance, b.provenance));
}

commvq::ModelCodecs merge_parts(const std::vector<CodecPart>& parts) {
  commvq::require(!parts.empty(), "there are no parts to merge");
  commvq::ModelCodecs whole = parts[0].codecs;
  std::vector<std::size_t> part_of(whole.layers.size(), 0);
  for (std::size_t part = 1; part < parts.size(); ++part) {
    require_same_calibration(parts[0], parts[part]);
    for (std::size_t layer = 0; layer < whole.layers.size(); ++layer) {
      if (!holds(parts[part].codecs.layers[layer])) continue;
      commvq::require(!holds(whole.layers[layer]), "layer ", layer, " is in ",
                      parts[part_of[layer]].path.string(), " and in ", parts[part].path.string(),
                      "; give each layer once");
      whole.layers[layer] = parts[part].codecs.layers[layer];
      part_of[layer] = part;
    }
  }
  for (std::size_t layer = 0; layer < whole.layers.size(); ++layer)
    commvq::require(holds(whole.layers[layer]), "layer ", layer, " of ", whole.layers.size(),
                    " is in none of the ", parts.size(), " parts; calibrate it with --layers ",
                    layer, ":", layer + 1);
  return whole;
}

PartsFolder::PartsFolder(const std::filesystem::path& out, commvq::ModelCodecs whole)
    : folder_(out), whole_(std::move(whole)) {
  folder_ += ".parts";
}

std::filesystem::path PartsFolder::path_of(int layer) const {
  return folder_ / ("layer-" + std::to_string(layer) + ".safetensors");
}

std::optional<commvq::LayerCodec> PartsFolder::load(int layer) const {
  const std::filesystem::path path = path_of(layer);
  if (!std::filesystem::exists(path)) return std::nullopt;
  const CodecPart kept{path, commvq::load_codecs(path)};
  try {
    require_same_calibration(kept, {"this run", whole_});
  } catch (const commvq::Error& error) {
    commvq::fail(error.what(), "; go on with the same options or remove ", folder_.string());
  }
  const commvq::LayerCodec& codec = kept.codecs.layers[static_cast<std::size_t>(layer)];
  return holds(codec) ? std::optional(codec) : std::nullopt;
}

void PartsFolder::save(int layer, const commvq::LayerCodec& codec) const {
  std::error_code error;
  std::filesystem::create_directories(folder_, error);
  commvq::require(!error, "cannot make the folder ", folder_.string(), ": ", error.message());
  commvq::ModelCodecs part = whole_;
  part.layers[static_cast<std::size_t>(layer)] = codec;
  commvq::save_codecs(path_of(layer), part);
}

void PartsFolder::remove() const {
  std::error_code ignored;  // the whole is written: what cannot be removed does no harm
  for (const auto& entry : std::filesystem::directory_iterator(folder_, ignored))
    if (entry.path().filename().string().starts_with("layer-"))
      std::filesystem::remove(entry.path(), ignored);
  std::filesystem::remove(folder_, ignored);
}

}  // namespace engine
