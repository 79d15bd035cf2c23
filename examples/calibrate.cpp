// Learns the codebooks of a model: runs it over text, collects keys and values, fits the codecs.
#include <algorithm>
#include <cstdio>
#include <random>
#include <sstream>

#include "commvq/commvq.hpp"

#include <CLI/CLI.hpp>

#include "engine/calibration_data.hpp"
#include "engine/codec_parts.hpp"
#include "engine/console.hpp"
#include "engine/generate.hpp"
#include "engine/hash.hpp"
#include "engine/learner.hpp"
#include "engine/stage_spread.hpp"
#include "engine/text_file.hpp"
#include "engine/tokenizer.hpp"

namespace {

using engine::Index;

struct Options {
  std::string model, text, out;
  std::string layers;  ///< "A:B"; empty: all
  bool self = false;
  bool propose_stages = false;
  int bits = 1;
  int context = 1024;
  int tokens = 0;      ///< 0: by the width of a layer
  int key_tokens = 0;  ///< 0: half of the tokens
  std::string method = "commvq";
  std::string device = "cpu";
  std::vector<int> stages;  ///< of the keys of all layers or each; 0: the method's, empty: spread
  // Of the key codec; 0: the method's.
  int codebook_size = 0;
  int group_pairs = 0;
  std::string norms;     ///< "token" or "head"; empty: the method's
  int em_steps = 0;      ///< 0: the method's
  int refine = -1;       ///< -1: the method's
  int value_steps = 0;   ///< 0: the method's
  int value_blocks = 0;  ///< 0: the method's
  int ranks = 1;         ///< devices that share the KV heads of every layer
  int rank = 0;          ///< whose heads to learn
  std::uint64_t seed = 1;
};

/// Decides what was left open. The wider a layer, the more there is to learn of its values, and the
/// more text that takes; what the network makes of a third pass over it, flips of bits and least
/// squares make as well.
Options with_defaults(Options options, const engine::ModelConfig& config) {
  constexpr int kFewest = 16384, kMost = 65536, kTokensOfChannel = 80;
  if (options.tokens == 0)
    options.tokens = std::clamp(kTokensOfChannel * config.kv_size(), kFewest, kMost);
  if (options.key_tokens == 0) options.key_tokens = std::max(1, options.tokens / 2);
  const commvq::ValueTrainerOptions own = commvq::ValueTrainerOptions::commvq({});
  if (options.value_steps == 0 && options.method != "paper")
    options.value_steps = std::clamp(2 * options.tokens / own.batch_tokens, 1, own.steps);
  return options;
}

std::vector<std::vector<int>> calibration_text(const Options& options, const engine::Model& model,
                                               const engine::Tokenizer& tokenizer) {
  if (!options.self) {
    const auto text = tokenizer.encode(engine::read_text_file(options.text));
    return engine::spread_contexts(text, options.context, options.tokens, tokenizer.prefix());
  }
  // Many short texts side by side: writing is sequential within each.
  const int length = std::min(options.context, 512);
  const int count = std::max(1, options.tokens / length);
  // A random token after the first makes the texts differ more than the model itself would.
  std::mt19937_64 random(options.seed);
  const int first = model.config().first_token;
  const auto vocab = static_cast<std::uint64_t>(model.config().vocab_size);
  std::vector<std::vector<int>> texts;
  texts.reserve(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) texts.push_back({first, static_cast<int>(random() % vocab)});
  engine::ProgressLine progress("Writing " + std::to_string(count * length) + " tokens");
  return engine::write_text(model, std::move(texts), length, options.seed,
                            [&](int written) { progress.update(double(written) / length); });
}

std::uint64_t seed_of(const Options& options, std::size_t layer) {
  return options.seed * 1000003 + layer;
}

/// Stages of a layer's keys; 0: the method's.
int stages_of(const Options& options, std::size_t layer) {
  if (options.stages.empty()) return 0;
  return options.stages[options.stages.size() == 1 ? 0 : layer];
}

commvq::KeyCodecConfig key_preset(const Options& options, const commvq::PairLayout& pairs) {
  using commvq::KeyCodecConfig;
  const bool one_bit = options.bits == 1;
  if (options.method == "paper")
    return one_bit ? KeyCodecConfig::paper_1bit(pairs) : KeyCodecConfig::paper_2bit(pairs);
  if (options.method == "speed")
    return one_bit ? KeyCodecConfig::speed_1bit(pairs) : KeyCodecConfig::speed_2bit(pairs);
  return one_bit ? KeyCodecConfig::commvq_1bit(pairs) : KeyCodecConfig::commvq_2bit(pairs);
}

/// The preset with what the options set for a layer.
commvq::KeyCodecConfig key_codec(const Options& options, std::size_t layer,
                                 const commvq::PairLayout& pairs) {
  commvq::KeyCodecConfig codec = key_preset(options, pairs);
  if (const int stages = stages_of(options, layer); stages > 0) codec.num_stages = stages;
  if (options.codebook_size > 0) codec.codebook_size = options.codebook_size;
  if (options.group_pairs > 0) codec.group_pairs = options.group_pairs;
  if (!options.norms.empty()) codec.norm_per_head = options.norms == "head";
  return codec;
}

commvq::KeyLearnerOptions key_options(const Options& options, std::size_t layer,
                                      const commvq::PairLayout& pairs,
                                      const commvq::QueryStatistics& queries) {
  using commvq::KeyLearnerOptions;
  const commvq::KeyCodecConfig preset = key_preset(options, pairs);
  KeyLearnerOptions keys;
  if (options.method == "paper") {
    keys = KeyLearnerOptions::paper(preset);
  } else {
    keys = KeyLearnerOptions::commvq(preset);
    keys.pair_weights = queries.pair_weights();
  }
  keys.codec = key_codec(options, layer, pairs);
  keys.max_tokens = options.key_tokens;
  if (options.em_steps > 0) keys.max_steps = options.em_steps;
  if (options.refine >= 0) keys.refinement.rounds = options.refine;
  return keys;
}

/// Blocks of the value codecs of a rank that has `num_kv_heads` heads.
int value_blocks(const Options& options, int num_kv_heads) {
  if (options.value_blocks > 0) return options.value_blocks;
  return options.method == "speed" ? num_kv_heads : 1;
}

commvq::ValueTrainerOptions value_options(const Options& options, int channels, int num_blocks) {
  using commvq::ValueCodecConfig;
  using commvq::ValueTrainerOptions;
  const bool one_bit = options.bits == 1;
  const int of_block = channels / num_blocks;
  ValueTrainerOptions values =
      options.method == "paper"
          ? ValueTrainerOptions::paper(one_bit ? ValueCodecConfig::paper_1bit(of_block)
                                               : ValueCodecConfig::paper_2bit(of_block))
          : ValueTrainerOptions::commvq(one_bit ? ValueCodecConfig::commvq_1bit(of_block)
                                                : ValueCodecConfig::commvq_2bit(of_block));
  values.codec = values.codec.repeated(num_blocks);
  if (options.value_steps > 0) values.steps = options.value_steps;
  return values;
}

/// Rank `rank`'s share of every row of `[rows][numbers.size() / rows]`.
std::vector<float> share_of(const Options& options, const std::vector<float>& numbers, Index rows) {
  const Index width = static_cast<Index>(numbers.size()) / rows, share = width / options.ranks;
  std::vector<float> result;
  for (Index r = 0; r < rows; ++r) {
    const auto first = numbers.begin() + r * width + options.rank * share;
    result.insert(result.end(), first, first + share);
  }
  return result;
}

commvq::LayerCodec learn_layer(const engine::Learner& learner, const Options& options,
                               const engine::ModelConfig& config, std::size_t layer,
                               engine::LayerData data, const commvq::ProgressCallback& progress,
                               std::uint64_t seed) {
  const Index channels = config.kv_size() / options.ranks;
  const auto rows = static_cast<Index>(data.keys.size()) / config.kv_size();
  commvq::KeyLearnerOptions keys = key_options(options, layer, config.rope.pairs, data.queries);
  if (options.ranks > 1) {
    if (!keys.pair_weights.empty()) keys.pair_weights = share_of(options, keys.pair_weights, 1);
    data.keys = share_of(options, data.keys, rows);
    data.values = share_of(options, data.values, rows);
  }
  keys.seed = seed;
  keys.progress = [&](commvq::Progress step) {
    step.fraction *= 0.5;
    progress(step);
  };
  commvq::ValueTrainerOptions values =
      value_options(options, static_cast<int>(channels),
                    value_blocks(options, config.num_kv_heads / options.ranks));
  values.seed = seed;
  values.progress = [&](commvq::Progress step) {
    step.fraction = 0.5 + 0.5 * step.fraction;
    progress(step);
  };
  const std::vector<float> all_keys = std::move(data.keys), all_values = std::move(data.values);
  return {std::make_shared<commvq::KeyCodec>(
              learner.learn_key_codec({all_keys.data(), rows, channels}, keys)),
          std::make_shared<commvq::ValueCodec>(
              learner.train_value_codec({all_values.data(), rows, channels}, values))};
}

/// Everything that decides what is learnt but the model, as words "name=value".
std::string provenance_of(const Options& options, const std::vector<std::vector<int>>& contexts) {
  engine::Hash text;
  for (const std::vector<int>& context : contexts) text.add_numbers(std::span(context));
  std::ostringstream words;
  words << "calibrate method=" << options.method << " bits=" << options.bits
        << " tokens=" << contexts.size() * contexts[0].size() << " context=" << options.context
        << " source=" << (options.self ? "self" : "file") << " text=" << text.text()
        << " key_tokens=" << options.key_tokens
        << " stages=" << engine::comma_separated(options.stages)
        << " codebook_size=" << options.codebook_size << " group_pairs=" << options.group_pairs
        << " em_steps=" << options.em_steps << " refine=" << options.refine
        << " value_steps=" << options.value_steps << " device=" << options.device
        << " seed=" << options.seed;
  if (!options.norms.empty()) words << " norms=" << options.norms;
  if (options.value_blocks > 0) words << " value_blocks=" << options.value_blocks;
  if (options.ranks > 1) words << " ranks=" << options.ranks << " rank=" << options.rank;
  return words.str();
}

/// The method's stages of the keys, spread over the layers.
std::vector<int> spread_stages(const Options& options, const engine::Learner& learner,
                               const engine::Model& model,
                               const std::vector<std::vector<int>>& contexts) {
  engine::ProgressLine progress("Spreading stages over the layers");
  return engine::propose_stages(
      learner, model, contexts,
      [&](std::size_t layer, const commvq::QueryStatistics& queries) {
        commvq::KeyLearnerOptions keys =
            key_options(options, layer, model.config().rope.pairs, queries);
        keys.seed = seed_of(options, layer);
        return keys;
      },
      [&](double share) { progress.update(share); });
}

/// What the codebook file will hold, still without codecs.
commvq::ModelCodecs empty_codecs(const Options& options, const engine::Model& model,
                                 const std::vector<std::vector<int>>& contexts) {
  commvq::ModelCodecs codecs;
  codecs.rope = model.config().rope;
  codecs.num_kv_heads = model.config().num_kv_heads / options.ranks;
  codecs.model_digest = model.digest();
  codecs.provenance = provenance_of(options, contexts);
  codecs.layers.resize(static_cast<std::size_t>(model.config().num_layers));
  return codecs;
}

/// Learns the layers `missing`, in ascending order, and keeps each in `parts` once it is there.
void learn_layers(const Options& options, const engine::Learner& learner,
                  const engine::Model& model, const std::vector<std::vector<int>>& contexts,
                  const std::vector<int>& missing, const engine::PartsFolder& parts,
                  std::vector<commvq::LayerCodec>& layers) {
  engine::CalibrationData data;
  {
    engine::ProgressLine progress("Running the model");
    data = engine::collect(
        model, contexts, [&](double share) { progress.update(share); },
        [&](int layer) { return std::binary_search(missing.begin(), missing.end(), layer); });
  }
  engine::ProgressLine progress("Learning " + std::to_string(options.bits) + "-bit codecs");
  for (std::size_t i = 0; i < missing.size(); ++i) {
    const auto at = static_cast<std::size_t>(missing[i]);
    const std::string title =
        "layer " + std::to_string(at + 1) + "/" + std::to_string(layers.size()) + ", ";
    layers[at] = learn_layer(
        learner, options, model.config(), at, std::move(data.layers[at]),
        [&](const commvq::Progress& step) {
          progress.update((double(i) + step.fraction) / double(missing.size()), title + step.phase);
        },
        seed_of(options, at));
    parts.save(missing[i], layers[at]);
  }
}

/// Throws unless the options fit the model and each other.
void check(const Options& options, const engine::ModelConfig& config,
           const engine::LayerRange& range) {
  commvq::require(config.num_kv_heads % options.ranks == 0, "--ranks is ", options.ranks,
                  "; it must divide the model's ", config.num_kv_heads, " KV heads");
  commvq::require(options.rank < options.ranks, "--rank is ", options.rank, "; there are ",
                  options.ranks, " ranks, the first of them 0");
  commvq::require(
      options.stages.size() <= 1 || static_cast<int>(options.stages.size()) == config.num_layers,
      "--stages has ", options.stages.size(), " numbers; give one, or one for each of ",
      config.num_layers, " layers");
  for (int layer = range.begin; layer < range.end; ++layer)
    key_codec(options, static_cast<std::size_t>(layer), config.rope.pairs).validate();
  const int rank_heads = config.num_kv_heads / options.ranks;
  commvq::require(rank_heads % value_blocks(options, rank_heads) == 0, "--value-blocks is ",
                  options.value_blocks, "; it must divide the ", rank_heads,
                  " KV heads that are learnt together");
  const bool is_part = range.end - range.begin < config.num_layers || options.ranks > 1;
  commvq::require(!is_part || !options.stages.empty() || options.method != "commvq",
                  "a part of the model does not tell how to spread the stages of its keys over the "
                  "layers: give --stages what calibrate --propose-stages prints, or --stages 0 for "
                  "as many in every layer");
}

/// The layers in `range` that `parts` does not hold; puts those that it holds into `layers`.
std::vector<int> missing_layers(const engine::LayerRange& range, const engine::PartsFolder& parts,
                                std::vector<commvq::LayerCodec>& layers) {
  std::vector<int> missing;
  for (int layer = range.begin; layer < range.end; ++layer)
    if (const auto kept = parts.load(layer))
      layers[static_cast<std::size_t>(layer)] = *kept;
    else
      missing.push_back(layer);
  const std::size_t num_kept = static_cast<std::size_t>(range.end - range.begin) - missing.size();
  if (num_kept > 0) std::printf("%zu layers kept from an earlier run\n", num_kept);
  return missing;
}

void print_summary(const Options& options, const engine::LayerRange& range,
                   const commvq::ModelCodecs& codecs) {
  commvq::CacheConfig config;
  config.rope = codecs.rope;
  config.num_kv_heads = codecs.num_kv_heads;
  double bytes = 0;  // mean over the layers
  for (int layer = range.begin; layer < range.end; ++layer)
    bytes += commvq::LayerCache(config, codecs.layers[static_cast<std::size_t>(layer)])
                 .bytes_per_token() /
             (range.end - range.begin);
  const double fp16 = 4.0 * double(config.num_channels());
  std::printf("%s: %d of %zu layers, %.3f bytes a token and layer, 1/%.2f of FP16\n",
              options.out.c_str(), range.end - range.begin, codecs.layers.size(), bytes,
              fp16 / bytes);
}

int calibrate(const Options& given) {
  const engine::Learner learner =
      given.device == "cuda" ? engine::device_learner() : engine::host_learner();
  const engine::Model model(given.model);
  Options options = with_defaults(given, model.config());
  const int num_layers = model.config().num_layers;
  const engine::LayerRange range = options.layers.empty()
                                       ? engine::LayerRange{0, num_layers}
                                       : engine::LayerRange::parse(options.layers, num_layers);
  check(options, model.config(), range);
  const engine::Tokenizer tokenizer(std::filesystem::path(options.model) / "tokenizer.json");
  const auto contexts = calibration_text(options, model, tokenizer);
  if (options.stages.empty())
    options.stages = options.method == "commvq" ? spread_stages(options, learner, model, contexts)
                                                : std::vector<int>{0};
  if (options.propose_stages) {
    std::printf("%s\n", engine::comma_separated(options.stages).c_str());
    return 0;
  }
  commvq::ModelCodecs codecs = empty_codecs(options, model, contexts);
  const engine::PartsFolder parts(options.out, codecs);
  const std::vector<int> missing = missing_layers(range, parts, codecs.layers);
  if (!missing.empty())
    learn_layers(options, learner, model, contexts, missing, parts, codecs.layers);
  commvq::save_codecs(options.out, codecs);
  parts.remove();
  print_summary(options, range, codecs);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("Learns the codebooks that compress a model's KV cache.");
  app.add_option("MODEL", options.model, "Folder of a Hugging Face Llama, Mistral or Qwen model")
      ->required();
  auto* text = app.add_option("--text", options.text, "Text file to calibrate on");
  app.add_flag("--self", options.self, "Let the model write its own text; no data is needed")
      ->excludes(text);
  app.add_option("--bits", options.bits, "Bits per number")
      ->check(CLI::IsMember({1, 2}))
      ->capture_default_str();
  app.add_option("--out", options.out,
                 "Codebook file to write; finished layers wait in OUT.parts, from which an "
                 "interrupted run goes on");
  app.add_option("--layers", options.layers,
                 "A:B: only layers A up to B, B left out, counted from 0; merge_codebooks joins "
                 "such files");
  app.add_option(
         "--tokens", options.tokens,
         "Tokens to calibrate on, spread over the text; by default 80 for each channel of a "
         "layer's keys, from 16,384 to 65,536")
      ->check(CLI::Range(64, 1 << 24));
  app.add_option("--context", options.context, "Tokens of one context")
      ->check(CLI::Range(16, 1 << 20))
      ->capture_default_str();
  app.add_option("--key-tokens", options.key_tokens,
                 "At most so many of them for the keys; by default half")
      ->check(CLI::Range(64, 1 << 24));
  app.add_option(
         "--method", options.method,
         "commvq: this library's own; speed: with codes that attention reads faster; paper: "
         "that of the CommVQ paper")
      ->check(CLI::IsMember({"commvq", "speed", "paper"}))
      ->capture_default_str();
  app.add_option("--stages", options.stages,
                 "Residual stages of the keys, of all layers or a list A,B,... with those of each; "
                 "0: the method's in all. By default commvq's are spread: more in layers where "
                 "coding keys does more harm")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(CLI::Range(0, 256));
  app.add_flag("--propose-stages", options.propose_stages,
               "Only print the stages that would be learnt, for --stages of processes that learn "
               "parts of the model");
  app.add_option("--codebook-size", options.codebook_size,
                 "Centroids of a key codebook; 0: the method's")
      ->check(CLI::Range(0, 65536))
      ->capture_default_str();
  app.add_option("--group-pairs", options.group_pairs,
                 "Rotary pairs of a key group; 0: the method's")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  app.add_option(
         "--norms", options.norms,
         "One norm of the keys a token, over all heads, or one a head, which takes more and "
         "loses less; by default the method's")
      ->check(CLI::IsMember({"token", "head"}));
  app.add_option("--em-steps", options.em_steps, "EM steps of each key stage; 0: the method's")
      ->check(CLI::Range(0, 10000))
      ->capture_default_str();
  app.add_option("--refine", options.refine,
                 "Rounds of joint least squares over all key stages; -1: the method's")
      ->check(CLI::Range(-1, 1000))
      ->capture_default_str();
  app.add_option(
         "--value-steps", options.value_steps,
         "Training steps of each value codec; 0: the method's, for commvq and speed at most "
         "two passes over the text")
      ->check(CLI::Range(0, 10000000))
      ->capture_default_str();
  app.add_option("--value-blocks", options.value_blocks,
                 "Blocks of KV heads whose values are coded apart; 0: the method's")
      ->check(CLI::Range(0, 65536))
      ->capture_default_str();
  app.add_option("--device", options.device, "Where codecs are learnt: cpu or cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  app.add_option("--ranks", options.ranks, "Devices that share the KV heads of every layer")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  app.add_option("--rank", options.rank, "Learn for the heads of this one of them, from 0 on")
      ->check(CLI::Range(0, 65535))
      ->capture_default_str();
  app.add_option("--seed", options.seed, "Seed of everything random")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  return engine::run_program([&] {
    commvq::require(options.self || !options.text.empty(), "give --text FILE or --self");
    commvq::require(options.propose_stages || !options.out.empty(), "give --out FILE");
    return calibrate(options);
  });
}
