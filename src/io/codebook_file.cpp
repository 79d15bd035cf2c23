#include "commvq/io/codebook_file.hpp"

#include <utility>

#include "commvq/core/error.hpp"
#include "commvq/io/safetensors.hpp"

#include <nlohmann/json.hpp>

#include "io/strict_json.hpp"

namespace commvq {
namespace {

using Json = nlohmann::json;
using detail::in_quotes;

constexpr const char* kFormat = "commvq.codecs";
constexpr const char* kVersion = "1";

/// Layers of one model; a file that claims more is lying.
constexpr std::size_t kMaxLayers = 65536;

/// Centroids of a book for each pair that shares its codes. An encoder holds codebook_size^2
/// numbers a stage, the file 2 * codebook_size * group_pairs or twice that: a small file must not
/// take all memory.
constexpr int kMaxCentroidsPerPair = 64;

constexpr std::pair<RopeLayout, const char*> kLayouts[] = {
    {RopeLayout::kHalfSplit, "half_split"}, {RopeLayout::kInterleaved, "interleaved"}};
constexpr std::pair<RopeScaling, const char*> kScalings[] = {{RopeScaling::kNone, "none"},
                                                             {RopeScaling::kLinear, "linear"},
                                                             {RopeScaling::kLlama3, "llama3"}};

template <class Enum, std::size_t size>
const char* name_in(const std::pair<Enum, const char*> (&names)[size], Enum value) {
  for (const auto& [candidate, name] : names)
    if (candidate == value) return name;
  fail("enumerator ", static_cast<int>(value), " has no name");
}

/// Typed access to a JSON object: every miss is an `Error` that names the field.
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
    require(object.is_object(), "codebook file: ", where_, " is not a JSON object");
  }
  bool has(const char* name) const { return object_.contains(name); }
  const Json& at(const char* name) const {
    require(has(name), "codebook file: ", where_, " has no field ", name);
    return object_[name];
  }
  int whole(const char* name) const {
    const Json& value = at(name);
    require(value.is_number_integer() && value >= -(1 << 30) && value <= (1 << 30),
            "codebook file: ", where_, ".", name, " is ", in_quotes(value.dump()),
            "; it must be a whole number of at most 2^30");
    return value.get<int>();
  }
  double number(const char* name) const {
    require(at(name).is_number(), "codebook file: ", where_, ".", name, " is ",
            in_quotes(at(name).dump()), "; it must be a number");
    return at(name).get<double>();
  }
  bool flag(const char* name) const {
    require(at(name).is_boolean(), "codebook file: ", where_, ".", name, " is ",
            in_quotes(at(name).dump()), "; it must be true or false");
    return at(name).get<bool>();
  }
  std::string text(const char* name) const {
    require(at(name).is_string(), "codebook file: ", where_, ".", name, " is ",
            in_quotes(at(name).dump()), "; it must be a string");
    return at(name).get<std::string>();
  }
  template <class Enum, std::size_t size>
  Enum one_of(const char* name, const std::pair<Enum, const char*> (&names)[size]) const {
    const std::string given = text(name);
    for (const auto& [value, known] : names)
      if (given == known) return value;
    fail("codebook file: ", where_, ".", name, " is ", in_quotes(given), ", which is not known");
  }

 private:
  const Json& object_;
  std::string where_;
};

Json to_json(const RopeConfig& rope) {
  return {{"head_dim", rope.pairs.head_dim},
          {"rotary_dim", rope.pairs.rotary_dim},
          {"layout", name_in(kLayouts, rope.pairs.layout)},
          {"theta", rope.theta},
          {"scaling", name_in(kScalings, rope.scaling)},
          {"factor", rope.factor},
          {"low_freq_factor", rope.low_freq_factor},
          {"high_freq_factor", rope.high_freq_factor},
          {"original_max_position", rope.original_max_position}};
}

RopeConfig rope_from(const Fields& fields) {
  RopeConfig rope;
  rope.pairs.head_dim = fields.whole("head_dim");
  rope.pairs.rotary_dim = fields.whole("rotary_dim");
  rope.pairs.layout = fields.one_of("layout", kLayouts);
  rope.theta = fields.number("theta");
  rope.scaling = fields.one_of("scaling", kScalings);
  rope.factor = fields.number("factor");
  rope.low_freq_factor = fields.number("low_freq_factor");
  rope.high_freq_factor = fields.number("high_freq_factor");
  rope.original_max_position = fields.number("original_max_position");
  rope.validate();
  return rope;
}

/// What a file may hold beyond what a codec may be.
void require_fit_for_file(const KeyCodecConfig& keys, std::size_t layer) {
  require(keys.codebook_size <= kMaxCentroidsPerPair * keys.group_pairs, "codebook_size of layer ",
          layer, " is ", keys.codebook_size, "; in a codebook file it may be ",
          kMaxCentroidsPerPair, " times group_pairs at most, which is ", keys.group_pairs);
}

Json to_json(const KeyCodecConfig& keys) {
  Json json = {{"group_pairs", keys.group_pairs}, {"codebook_size", keys.codebook_size},
               {"num_stages", keys.num_stages},   {"tied", keys.tied},
               {"beam_width", keys.beam_width},   {"norm_per_head", keys.norm_per_head}};
  if (keys.graded) json["graded"] = true;
  return json;
}

KeyCodecConfig key_config_from(const Fields& fields, const PairLayout& pairs, std::size_t layer) {
  KeyCodecConfig keys;
  keys.pairs = pairs;
  keys.group_pairs = fields.whole("group_pairs");
  keys.codebook_size = fields.whole("codebook_size");
  keys.num_stages = fields.whole("num_stages");
  keys.tied = fields.flag("tied");
  keys.beam_width = fields.whole("beam_width");
  keys.norm_per_head = fields.has("norm_per_head") && fields.flag("norm_per_head");
  keys.graded = fields.has("graded") && fields.flag("graded");
  keys.validate();
  require_fit_for_file(keys, layer);
  return keys;
}

Json to_json(const ValueCodecConfig& values) {
  Json json = {{"num_channels", values.num_channels},
               {"bits", values.bits},
               {"hidden_size", values.hidden_size},
               {"polish_sweeps", values.polish_sweeps}};
  if (values.num_blocks > 1) json["num_blocks"] = values.num_blocks;
  if (values.graded) json["graded"] = true;
  return json;
}

ValueCodecConfig value_config_from(const Fields& fields) {
  ValueCodecConfig values;
  values.num_channels = fields.whole("num_channels");
  values.bits = fields.whole("bits");
  values.hidden_size = fields.whole("hidden_size");
  if (fields.has("polish_sweeps")) values.polish_sweeps = fields.whole("polish_sweeps");
  if (fields.has("num_blocks")) values.num_blocks = fields.whole("num_blocks");
  values.graded = fields.has("graded") && fields.flag("graded");
  values.validate();
  return values;
}

std::string prefix_of(std::size_t layer) {
  return "layers." + std::to_string(layer) + ".";
}

/// Books of a stage as stored: a tied stage stores the first only.
int stored_books(const KeyCodecConfig& config) {
  return config.tied ? 1 : 2;
}

std::vector<Index> codebook_shape(const KeyCodecConfig& config, int num_heads) {
  return {num_heads,
          config.num_groups(),
          config.num_stages,
          stored_books(config),
          config.codebook_size,
          Index{2} * config.group_pairs};
}

void add_keys(SafetensorsWriter& writer, const std::string& prefix, const KeyCodec& keys) {
  const KeyCodecConfig& config = keys.config();
  std::vector<float> stored;
  for (int head = 0; head < keys.num_kv_heads(); ++head)
    for (int group = 0; group < config.num_groups(); ++group)
      for (int stage = 0; stage < config.num_stages; ++stage)
        for (int which = 0; which < stored_books(config); ++which) {
          const float* const book = keys.codebook(head).book(group, stage, which);
          stored.insert(stored.end(), book,
                        book + Index{config.codebook_size} * keys.codebook(head).row_size());
        }
  writer.add(prefix + "keys.codebooks", codebook_shape(config, keys.num_kv_heads()), stored);
  if (!keys.is_weighted()) return;
  std::vector<float> weights;
  for (int head = 0; head < keys.num_kv_heads(); ++head) {
    const std::vector<float>& of_head = keys.codebook(head).pair_weights;
    weights.insert(weights.end(), of_head.begin(), of_head.end());
  }
  writer.add(prefix + "keys.pair_weights", {keys.num_kv_heads(), config.pairs.num_pairs()},
             weights);
}

std::shared_ptr<const KeyCodec> read_keys(const SafetensorsFile& file, const std::string& prefix,
                                          const KeyCodecConfig& config, int num_heads) {
  const std::vector<float> stored =
      file.at(prefix + "keys.codebooks").to_floats(codebook_shape(config, num_heads));
  const int num_pairs = config.pairs.num_pairs();
  std::vector<float> weights;
  if (const std::string name = prefix + "keys.pair_weights"; file.contains(name))
    weights = file.at(name).to_floats({num_heads, num_pairs});
  const Index book_size = Index{config.codebook_size} * 2 * config.group_pairs;
  auto next = stored.begin();
  std::vector<KeyCodebook<float>> codebooks;
  for (int head = 0; head < num_heads; ++head) {
    KeyCodebook<float> codebook(config);
    for (int group = 0; group < config.num_groups(); ++group)
      for (int stage = 0; stage < config.num_stages; ++stage)
        for (int which = 0; which < stored_books(config); ++which, next += book_size)
          std::copy_n(next, book_size, codebook.book(group, stage, which));
    if (config.tied) codebook.derive_tied_books();
    if (!weights.empty())
      codebook.pair_weights.assign(weights.begin() + head * num_pairs,
                                   weights.begin() + (head + 1) * num_pairs);
    codebooks.push_back(std::move(codebook));
  }
  return std::make_shared<KeyCodec>(std::move(codebooks));
}

/// Name, shape and place of every tensor of a value codec.
template <class Weights, class Visit>
void visit_values(const ValueCodecConfig& config, Weights& weights, Visit&& visit) {
  const Index B = config.num_blocks, C = config.block().num_channels;
  const Index H = config.hidden_size, L = config.num_logits();
  visit("norm_gain", std::vector<Index>{B * C}, weights.norm_gain);
  visit("norm_bias", std::vector<Index>{B * C}, weights.norm_bias);
  visit("hidden_weight", std::vector<Index>{B * H, C}, weights.hidden_weight);
  visit("hidden_bias", std::vector<Index>{B * H}, weights.hidden_bias);
  visit("output_weight", std::vector<Index>{L, H}, weights.output_weight);
  visit("output_bias", std::vector<Index>{L}, weights.output_bias);
  visit("decoder", std::vector<Index>{config.num_code_bits(), C}, weights.decoder);
}

void add_values(SafetensorsWriter& writer, const std::string& prefix, const ValueCodec& values) {
  visit_values(values.config(), values.weights(),
               [&](const char* name, const std::vector<Index>& shape, const auto& weight) {
                 writer.add(prefix + "values." + name, shape, weight);
               });
  if (values.is_scaled())
    writer.add(prefix + "values.channel_scales", {values.config().num_channels},
               values.weights().channel_scales);
}

std::shared_ptr<const ValueCodec> read_values(const SafetensorsFile& file,
                                              const std::string& prefix,
                                              const ValueCodecConfig& config) {
  ValueCodecWeights weights;
  visit_values(config, weights,
               [&](const char* name, const std::vector<Index>& shape, auto& weight) {
                 weight = file.at(prefix + "values." + name).to_floats(shape);
               });
  if (const std::string name = prefix + "values.channel_scales"; file.contains(name))
    weights.channel_scales = file.at(name).to_floats({config.num_channels});
  return std::make_shared<ValueCodec>(config, std::move(weights));
}

Json configuration_of(const ModelCodecs& codecs) {
  Json layers = Json::array();
  for (const LayerCodec& layer : codecs.layers)
    layers.push_back({{"keys", layer.keys ? to_json(layer.keys->config()) : Json()},
                      {"values", layer.values ? to_json(layer.values->config()) : Json()}});
  return {{"rope", to_json(codecs.rope)},
          {"num_kv_heads", codecs.num_kv_heads},
          {"model_digest", codecs.model_digest},
          {"provenance", codecs.provenance},
          {"layers", layers}};
}

const std::string& metadata_at(const SafetensorsFile& file, const char* name) {
  const auto found = file.metadata().find(name);
  require(found != file.metadata().end(), file.path().string(), " is not a codebook file: its ",
          "metadata has no ", name);
  return found->second;
}

}  // namespace

void ModelCodecs::validate() const {
  rope.validate();
  require(num_kv_heads >= 1 && num_kv_heads <= 65536, "num_kv_heads is ", num_kv_heads,
          "; it must be in [1, 65536]");
  require(!layers.empty(), "there are codecs for no layer");
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const LayerCodec& layer = layers[i];
    if (layer.keys) {
      require(layer.keys->num_kv_heads() == num_kv_heads, "the key codec of layer ", i, " has ",
              layer.keys->num_kv_heads(), " heads; the model has ", num_kv_heads);
      require(layer.keys->config().pairs == rope.pairs, "the key codec of layer ", i,
              " pairs channels differently from the model's RoPE (head_dim ",
              layer.keys->config().pairs.head_dim, " and ", rope.pairs.head_dim, ")");
    }
    if (layer.values) {
      const ValueCodecConfig& values = layer.values->config();
      require(values.num_channels == num_kv_heads * rope.pairs.head_dim,
              "the value codec of layer ", i, " has ", values.num_channels,
              " channels; the model has ", num_kv_heads * rope.pairs.head_dim);
      require(num_kv_heads % values.num_blocks == 0, "the value codec of layer ", i,
              " has num_blocks ", values.num_blocks, ", which does not divide the ", num_kv_heads,
              " KV heads: a block holds whole heads");
    }
  }
}

void ModelCodecs::require_model(const RopeConfig& model_rope, int heads, int num_layers,
                                const std::string& digest) const {
  require(heads == num_kv_heads, "these codebooks are for ", num_kv_heads,
          " KV heads; the model has ", heads);
  require(num_layers == static_cast<int>(layers.size()), "these codebooks are for ", layers.size(),
          " layers; the model has ", num_layers);
  require(model_rope.pairs.head_dim == rope.pairs.head_dim, "these codebooks are for head_dim ",
          rope.pairs.head_dim, "; the model has ", model_rope.pairs.head_dim);
  require(model_rope == rope, "these codebooks were learnt with another RoPE (theta ", rope.theta,
          "; the model has theta ", model_rope.theta, ", or scaling or layout differ)");
  require(digest == model_digest, "these codebooks were learnt from model ", model_digest,
          "; this is model ", digest, ": calibrate it and use its own codebooks");
}

void save_codecs(const std::filesystem::path& path, const ModelCodecs& codecs) {
  codecs.validate();
  for (std::size_t i = 0; i < codecs.layers.size(); ++i)
    if (codecs.layers[i].keys) require_fit_for_file(codecs.layers[i].keys->config(), i);
  SafetensorsWriter writer;
  writer.set_metadata("format", kFormat);
  writer.set_metadata("version", kVersion);
  writer.set_metadata("config", configuration_of(codecs).dump());
  for (std::size_t i = 0; i < codecs.layers.size(); ++i) {
    if (codecs.layers[i].keys) add_keys(writer, prefix_of(i), *codecs.layers[i].keys);
    if (codecs.layers[i].values) add_values(writer, prefix_of(i), *codecs.layers[i].values);
  }
  writer.write(path);
}

ModelCodecs load_codecs(const std::filesystem::path& path) {
  const SafetensorsFile file(path);
  require(metadata_at(file, "format") == kFormat, path.string(), " has format ",
          in_quotes(metadata_at(file, "format")), "; codebook files have ", in_quotes(kFormat));
  require(metadata_at(file, "version") == kVersion, path.string(), " has version ",
          in_quotes(metadata_at(file, "version")), "; this library reads version ", kVersion);
  const Json json = detail::parse_strict_json(metadata_at(file, "config"), /*max_depth=*/8,
                                              path.string() + ": config");
  const Fields fields(json, "config");

  ModelCodecs codecs;
  codecs.rope = rope_from(Fields(fields.at("rope"), "rope"));
  codecs.num_kv_heads = fields.whole("num_kv_heads");
  require(codecs.num_kv_heads >= 1 && codecs.num_kv_heads <= 65536,
          "codebook file: num_kv_heads is ", codecs.num_kv_heads, "; it must be in [1, 65536]");
  codecs.model_digest = fields.text("model_digest");
  codecs.provenance = fields.text("provenance");
  const Json& layers = fields.at("layers");
  require(layers.is_array() && !layers.empty() && layers.size() <= kMaxLayers,
          "codebook file: layers must be a list of 1 to ", kMaxLayers, " objects");
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const std::string where = "layers[" + std::to_string(i) + "]";
    const Fields layer(layers[i], where);
    LayerCodec codec;
    if (!layer.at("keys").is_null())
      codec.keys = read_keys(
          file, prefix_of(i),
          key_config_from(Fields(layer.at("keys"), where + ".keys"), codecs.rope.pairs, i),
          codecs.num_kv_heads);
    if (!layer.at("values").is_null())
      codec.values = read_values(file, prefix_of(i),
                                 value_config_from(Fields(layer.at("values"), where + ".values")));
    codecs.layers.push_back(std::move(codec));
  }
  codecs.validate();
  return codecs;
}

}  // namespace commvq
