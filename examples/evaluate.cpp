// Measures what compressed caches cost in quality: perplexity, agreement, logit error, retrieval.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>
#include <mutex>
#include <numeric>

#include "commvq/commvq.hpp"
#include "commvq/cuda/integer_codebook.hpp"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "engine/cache_method.hpp"
#include "engine/cache_results.hpp"
#include "engine/calibration_data.hpp"
#include "engine/console.hpp"
#include "engine/evaluation.hpp"
#include "engine/generate.hpp"
#include "engine/hash.hpp"
#include "engine/parallel.hpp"
#include "engine/peers/peer.hpp"
#include "engine/stage_spread.hpp"
#include "engine/text_file.hpp"

namespace {

using engine::Index;

/// Facts that are planted in one text, which is read once for their questions.
constexpr int kQuestionsOfText = 10;

struct Options {
  std::string model, text, json, exact;
  bool self = false;
  std::vector<std::string> codebooks, peers;
  std::string calibration;
  int calibration_tokens = 16384;
  bool device_keys = false, by_layer = false;
  int context = 4096;
  int windows = 4;
  int questions = 20;
  Index window = 128, sinks = 0;
  std::uint64_t seed = 2, peer_seed = 1;
};

/// One way to store the cache, and what was measured of it.
struct Row {
  engine::CacheMethod method;
  engine::CacheResults results = {};
  engine::LogitError logits = {};
  bool known = false;  ///< results were read from a file

  double ratio() const { return 16 / method.bits_per_number; }  ///< FP16 over coded
  long retrieved() const {
    return std::count(results.retrieved.begin(), results.retrieved.end(), 1);
  }
  double perplexity() const {
    double nll = 0, tokens = 0;
    for (const engine::Predictions& context : results.predictions) {
      nll = std::accumulate(context.nll.begin(), context.nll.end(), nll);
      tokens += double(context.nll.size());
    }
    return std::exp(nll / tokens);
  }
  /// Share of tokens after which both hold the same next token most probable.
  double agreement(const Row& exact) const {
    double same = 0, tokens = 0;
    for (std::size_t w = 0; w < results.predictions.size(); ++w) {
      const std::vector<int>& best = results.predictions[w].best;
      same +=
          std::inner_product(best.begin(), best.end(), exact.results.predictions[w].best.begin(),
                             0.0, std::plus<>(), std::equal_to<>());
      tokens += double(best.size());
    }
    return same / tokens;
  }
};

/// The same codecs with key codebooks rounded to integers, as CUDA devices read them.
std::vector<commvq::LayerCodec> rounded_to_integers(std::vector<commvq::LayerCodec> codecs,
                                                    const std::string& name) {
  for (commvq::LayerCodec& layer : codecs) {
    commvq::require(layer.keys && layer.values, "--device-keys: codebooks ", name,
                    " leave a side of a layer exact; devices need both coded");
    const commvq::cuda::DevicePageLayout layout(layer.keys->config(), layer.keys->num_kv_heads(),
                                                layer.values->config(), /*page_size=*/64,
                                                commvq::cuda::key_plane_bytes(90));
    layer.keys =
        std::make_shared<commvq::KeyCodec>(commvq::cuda::rounded_to_integers(*layer.keys, layout));
  }
  return codecs;
}

/// What peers learn from: nothing where none of them does.
engine::CalibrationData calibration_of(const Options& options, const engine::Model& model,
                                       const engine::Tokenizer& tokenizer,
                                       const std::vector<engine::Peer>& peers) {
  const auto learnt = std::find_if(peers.begin(), peers.end(), [](auto& p) { return p.learnt(); });
  if (learnt == peers.end()) return {};
  commvq::require(!options.calibration.empty(), "peer ", learnt->name,
                  " learns its codebooks: give --calibration FILE");
  commvq::require(options.self || !std::filesystem::equivalent(options.calibration, options.text),
                  "--calibration and --text are both ", options.text,
                  "; peers must not learn from the text they are evaluated on");
  const auto contexts =
      engine::spread_contexts(tokenizer.encode(engine::read_text_file(options.calibration)),
                              options.context, options.calibration_tokens, tokenizer.prefix());
  engine::ProgressLine progress("Running the model on the calibration text");
  return engine::collect(model, contexts, [&](double share) { progress.update(share); });
}

void add_peers(const Options& options, const engine::Model& model,
               const engine::Tokenizer& tokenizer, std::vector<Row>& rows) {
  std::vector<engine::Peer> peers;
  for (const std::string& name : options.peers) peers.push_back(engine::Peer::parse(name));
  const engine::CalibrationData data = calibration_of(options, model, tokenizer, peers);
  for (const engine::Peer& peer : peers) {
    engine::ProgressLine progress("Making " + peer.name);
    rows.push_back({engine::peer_method(peer.name, model,
                                        peer.make_layers(model.config(), data, options.peer_seed),
                                        options.window, options.sinks)});
  }
}

std::vector<Row> make_rows(const Options& options, const engine::Model& model,
                           const engine::Tokenizer& tokenizer) {
  std::vector<Row> rows;
  const auto add = [&](const std::string& name, const std::vector<commvq::LayerCodec>& codecs) {
    rows.push_back({engine::codec_method(name, model, codecs, options.window, options.sinks)});
  };
  add("exact fp16", {});
  for (const std::string& path : options.codebooks) {
    const commvq::ModelCodecs codecs = commvq::load_codecs(path);
    codecs.require_model(model.config().rope, model.config().num_kv_heads,
                         model.config().num_layers, model.digest());
    const std::string name = std::filesystem::path(path).stem().string();
    add(name, codecs.layers);
    if (options.device_keys) add(name + " integer keys", rounded_to_integers(codecs.layers, name));
  }
  add_peers(options, model, tokenizer, rows);
  return rows;
}

std::vector<int> text_of(const Options& options, const engine::Model& model,
                         const engine::Tokenizer& tokenizer) {
  if (!options.self) return tokenizer.encode(engine::read_text_file(options.text));
  const int count = std::max(options.windows, 1);
  engine::ProgressLine progress("Writing " + std::to_string(count * options.context) + " tokens");
  const std::vector<int> first = {model.config().first_token};
  const auto texts = engine::write_text(
      model, std::vector(static_cast<std::size_t>(count), first), options.context, options.seed,
      [&](int written) { progress.update(double(written) / options.context); });
  std::vector<int> tokens;
  for (const auto& text : texts) tokens.insert(tokens.end(), text.begin(), text.end());
  return tokens;
}

/// Counts tasks that end, on a progress line.
class TaskCount {
 public:
  TaskCount(const std::string& title, std::size_t count) : line_(title), count_(count) {}

  void ended(const std::string& name) {
    const std::lock_guard lock(mutex_);
    line_.update(double(++ended_) / double(count_), name);
  }

 private:
  engine::ProgressLine line_;
  std::size_t count_, ended_ = 0;
  std::mutex mutex_;
};

/// Names what the results of the exact cache depend on.
std::string key_of_exact(const Options& options, const engine::Model& model,
                         const std::vector<int>& text) {
  engine::Hash hash;
  hash.add_numbers(std::span(text));
  return "model " + model.digest() + ", text " + hash.text() + ", context " +
         std::to_string(options.context) + ", contexts " + std::to_string(options.windows) +
         ", questions " + std::to_string(options.questions) + " of " +
         std::to_string(kQuestionsOfText) + " a text, seed " + std::to_string(options.seed);
}

/// The rows that must run.
std::vector<Row*> unknown(std::vector<Row>& rows) {
  std::vector<Row*> result;
  for (Row& row : rows)
    if (!row.known) result.push_back(&row);
  return result;
}

void run_contexts(const engine::Model& model, const std::vector<std::vector<int>>& windows,
                  const std::vector<Row*>& rows) {
  for (Row* row : rows) row->results.predictions.resize(windows.size());
  const std::size_t num_tasks = rows.size() * windows.size();
  TaskCount count("Perplexity", num_tasks);
  engine::for_each_task(static_cast<Index>(num_tasks), [&](Index task) {
    const std::size_t w = static_cast<std::size_t>(task) / rows.size();
    Row& row = *rows[static_cast<std::size_t>(task) % rows.size()];
    const auto cache = row.method.new_cache();
    row.results.predictions[w] = engine::predict(model, *cache, windows[w]);
    if (w == 0) row.results.allocated_bytes = cache->allocated_bytes();
    count.ended(row.method.name);
  });
}

void ask_questions(const Options& options, const engine::Model& model,
                   const engine::Tokenizer& tokenizer, const std::vector<int>& text,
                   const std::vector<Row*>& rows) {
  for (Row* row : rows) row->results.retrieved.resize(static_cast<std::size_t>(options.questions));
  const std::size_t num_texts =
      static_cast<std::size_t>((options.questions + kQuestionsOfText - 1) / kQuestionsOfText);
  const std::size_t num_tasks = rows.size() * num_texts;
  TaskCount count("Retrieval", num_tasks);
  engine::for_each_task(static_cast<Index>(num_tasks), [&](Index task) {
    const auto i = static_cast<int>(static_cast<std::size_t>(task) / rows.size());
    Row& row = *rows[static_cast<std::size_t>(task) % rows.size()];
    const int first = i * kQuestionsOfText;
    const auto asked = engine::retrieval_case(tokenizer, text, options.context,
                                              std::min(kQuestionsOfText, options.questions - first),
                                              options.seed, i);
    const std::vector<char> right =
        engine::retrieve(model, tokenizer, *row.method.new_cache(), asked);
    std::copy(right.begin(), right.end(), row.results.retrieved.begin() + first);
    count.ended(row.method.name);
  });
}

void measure_logits(const Options& options, const engine::Model& model,
                    const std::vector<int>& window, const std::vector<Row*>& rows) {
  const engine::LogitProbe probe(model, window);
  engine::for_each_task(static_cast<Index>(rows.size()), [&](Index task) {
    Row& row = *rows[static_cast<std::size_t>(task)];
    row.logits = probe.error_of(row.method.key_round_trips, options.window);
  });
}

void print_table(const Options& options, std::size_t num_windows, const engine::Model& model,
                 const std::vector<Row>& rows) {
  std::printf("%zu contexts of %d tokens, the newest %lld exact\n\n", num_windows, options.context,
              static_cast<long long>(options.window));
  std::printf("%-20s %7s %10s %9s %7s %11s %9s %9s %8s %10s\n", "cache", "bits", "perplexity",
              "increase", "top-1", "logit error", "retrieval", "B/token", "vs fp16", "allocated");
  const double numbers = 2.0 * model.config().kv_size() * model.config().num_layers;
  for (const Row& row : rows)
    std::printf(
        "%-20s %7.3f %10.3f %8.2f%% %6.1f%% %10.1f%% %6ld/%-2d %9.1f %7.2fx %10s\n",
        row.method.name.c_str(), row.method.bits_per_number, row.perplexity(),
        100 * (row.perplexity() / rows[0].perplexity() - 1), 100 * row.agreement(rows[0]),
        100 * row.logits.relative(), row.retrieved(), options.questions,
        row.method.bits_per_number * numbers / 8, row.ratio(),
        row.method.packed ? engine::human_bytes(double(row.results.allocated_bytes)).c_str() : "-");
}

void write_json(const Options& options, std::size_t num_windows, const engine::Model& model,
                const std::vector<Row>& rows) {
  nlohmann::json caches = nlohmann::json::array();
  const double numbers = 2.0 * model.config().kv_size() * model.config().num_layers;
  for (const Row& row : rows) {
    caches.push_back({{"cache", row.method.name},
                      {"bits_per_number", row.method.bits_per_number},
                      {"perplexity", row.perplexity()},
                      {"perplexity_increase", row.perplexity() / rows[0].perplexity() - 1},
                      {"top1_agreement", row.agreement(rows[0])},
                      {"logit_rms_error", row.logits.rms()},
                      {"logit_relative_error", row.logits.relative()},
                      {"retrieved", row.retrieved()},
                      {"bytes_per_token", row.method.bits_per_number * numbers / 8},
                      {"ratio_to_fp16", row.ratio()}});
    if (row.method.packed) caches.back()["allocated_bytes"] = row.results.allocated_bytes;
  }
  const nlohmann::json report = {{"model", options.model},  {"context", options.context},
                                 {"contexts", num_windows}, {"window", options.window},
                                 {"sinks", options.sinks},  {"questions", options.questions},
                                 {"seed", options.seed},    {"caches", caches}};
  std::ofstream file(options.json);
  file << report.dump(2) << "\n";
  commvq::require(file.flush().good(), "cannot write ", options.json);
}

/// Prints what coding one side of one layer alone does to the next token's distribution, and how
/// the stages of the keys could be spread over the layers.
void print_layers(const Options& options, const engine::Model& model,
                  const std::vector<int>& window) {
  for (const std::string& path : options.codebooks) {
    const std::vector<commvq::LayerCodec> codecs = commvq::load_codecs(path).layers;
    const engine::LayerDivergences divergences = [&] {
      engine::ProgressLine progress("Layer by layer");
      return engine::measure_layers(model, codecs, window, options.window, options.sinks,
                                    [&](double share) { progress.update(share, path); });
    }();
    std::printf("\n%s, each side of each layer coded alone:\n%-8s %12s %12s\n", path.c_str(),
                "layer", "keys", "values");
    for (std::size_t layer = 0; layer < codecs.size(); ++layer)
      std::printf("%-8zu %12.6f %12.6f\n", layer, divergences.keys[layer],
                  divergences.values[layer]);
    const auto stages_of = [](const commvq::LayerCodec& codec) {
      return codec.keys ? codec.keys->config().num_stages : 0;
    };
    const int stages = stages_of(codecs[0]);
    const bool is_even = std::all_of(codecs.begin(), codecs.end(),
                                     [&](const auto& codec) { return stages_of(codec) == stages; });
    if (stages == 0 || !is_even || 2 * stages > engine::kMostTimedStages) continue;
    std::printf("no more stages of the keys, spread over the layers: --stages %s\n",
                engine::comma_separated(engine::spread_stages(divergences.keys, stages)).c_str());
  }
}

int evaluate(const Options& options) {
  const engine::Model model(options.model);
  const engine::Tokenizer tokenizer(std::filesystem::path(options.model) / "tokenizer.json");
  std::vector<Row> rows = make_rows(options, model, tokenizer);
  const std::vector<int> text = text_of(options, model, tokenizer);
  const auto windows =
      engine::windows_of(text, options.context, options.windows, tokenizer.prefix());
  if (options.by_layer) {
    print_layers(options, model, windows[0]);
    return 0;
  }
  const std::string key = key_of_exact(options, model, text);
  if (!options.exact.empty())
    if (auto results = engine::load_results(options.exact, key)) {
      rows[0].results = *std::move(results);
      rows[0].known = true;
    }
  const std::vector<Row*> to_run = unknown(rows);
  run_contexts(model, windows, to_run);
  ask_questions(options, model, tokenizer, text, to_run);
  if (rows.size() > 1) measure_logits(options, model, windows[0], to_run);
  if (!options.exact.empty() && !rows[0].known)
    engine::save_results(options.exact, key, rows[0].results);
  print_table(options, windows.size(), model, rows);
  if (!options.json.empty()) write_json(options, windows.size(), model, rows);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("Measures the quality of compressed KV caches against the exact one.");
  app.add_option("MODEL", options.model, "Folder of a Hugging Face Llama, Mistral or Qwen model")
      ->required();
  auto* text = app.add_option("--text", options.text, "Text file to evaluate on");
  app.add_flag("--self", options.self, "Let the model write the text")->excludes(text);
  app.add_option("--codebooks", options.codebooks, "Codebook files that calibrate wrote");
  app.add_option(
      "--peers", options.peers,
      "Other methods to compare with: kivi, rotation, pq and rq with _1bit, _2bit, _4bit "
      "or _8bit, and _roped for keys coded after RoPE (kivi_2bit_roped)");
  app.add_option("--calibration", options.calibration,
                 "Text file that pq and rq learn from; not the text to evaluate on");
  app.add_option("--calibration-tokens", options.calibration_tokens,
                 "Tokens of it, spread over the text")
      ->check(CLI::Range(64, 1 << 24))
      ->capture_default_str();
  app.add_option("--peer-seed", options.peer_seed, "Seed of rotations and k-means")
      ->capture_default_str();
  app.add_flag("--device-keys", options.device_keys,
               "Also with keys in integers, as CUDA devices read them");
  app.add_flag("--by-layer", options.by_layer,
               "Instead: the divergence of the next token's distribution when one side of one "
               "layer is coded, in one context, and stages for calibrate --stages. Give text that "
               "nothing is evaluated on");
  app.add_option("--context", options.context, "Tokens of one context")
      ->check(CLI::Range(64, 1 << 20))
      ->capture_default_str();
  app.add_option("--contexts", options.windows, "Contexts to measure; 0: the whole text")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  app.add_option("--questions", options.questions, "Retrieval questions, ten of one text")
      ->check(CLI::Range(0, 100000))
      ->capture_default_str();
  app.add_option("--window", options.window, "Newest tokens that stay exact")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  app.add_option("--sinks", options.sinks, "First tokens that stay exact")
      ->check(CLI::Range(0, 1 << 24))
      ->capture_default_str();
  app.add_option("--seed", options.seed, "Seed of questions and written text")
      ->capture_default_str();
  app.add_option(
      "--exact", options.exact,
      "File to keep the exact cache's results in: where it holds those of the same model, "
      "text and options, the exact cache need not run again");
  app.add_option("--json", options.json, "Also write the results to this file");
  CLI11_PARSE(app, argc, argv);
  return engine::run_program([&] {
    commvq::require(options.self || !options.text.empty(), "give --text FILE or --self");
    return evaluate(options);
  });
}
