// Measures what compressed caches cost in quality: perplexity, agreement, logit error, retrieval.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <mutex>

#include "commvq/commvq.hpp"
#include "commvq/cuda/integer_codebook.hpp"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "engine/cache_method.hpp"
#include "engine/calibration_data.hpp"
#include "engine/console.hpp"
#include "engine/evaluation.hpp"
#include "engine/generate.hpp"
#include "engine/parallel.hpp"
#include "engine/peers/peer.hpp"
#include "engine/text_file.hpp"

namespace {

using engine::Index;

struct Options {
  std::string model, text, json;
  bool self = false;
  std::vector<std::string> codebooks, peers;
  std::string calibration;
  int calibration_tokens = 16384;
  bool device_keys = false;
  int context = 4096;
  int windows = 4;
  int questions = 20;
  Index window = 128, sinks = 0;
  std::uint64_t seed = 2, peer_seed = 1;
};

/// One way to store the cache, and what was measured of it.
struct Row {
  engine::CacheMethod method;
  double perplexity = 0, top1_agreement = 0, logit_rms = 0, logit_relative = 0;
  Index allocated_bytes = 0;  ///< after one context
  int retrieved = 0;

  double ratio() const { return 16 / method.bits_per_number; }  ///< FP16 over coded
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
                              options.context, options.calibration_tokens);
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
  const std::vector<int> first = {std::max(0, tokenizer.added_token("<|endoftext|>"))};
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

/// Perplexity and agreement of every row; row 0 is the exact cache.
void measure_perplexity(const engine::Model& model, const std::vector<std::vector<int>>& windows,
                        std::vector<Row>& rows) {
  std::vector<engine::Predictions> predictions(rows.size() * windows.size());
  TaskCount count("Perplexity", predictions.size());
  engine::for_each_task(static_cast<Index>(predictions.size()), [&](Index task) {
    const auto at = static_cast<std::size_t>(task);
    Row& row = rows[at / windows.size()];
    const auto cache = row.method.new_cache();
    predictions[at] = engine::predict(model, *cache, windows[at % windows.size()]);
    if (at % windows.size() == 0) row.allocated_bytes = cache->allocated_bytes();
    count.ended(row.method.name);
  });
  for (std::size_t r = 0; r < rows.size(); ++r) {
    double nll = 0, same = 0, tokens = 0;
    for (std::size_t w = 0; w < windows.size(); ++w) {
      const engine::Predictions& exact = predictions[w];
      const engine::Predictions& predicted = predictions[r * windows.size() + w];
      for (std::size_t i = 0; i < predicted.nll.size(); ++i) {
        nll += predicted.nll[i];
        same += predicted.best[i] == exact.best[i];
      }
      tokens += double(predicted.nll.size());
    }
    rows[r].perplexity = std::exp(nll / tokens);
    rows[r].top1_agreement = same / tokens;
  }
}

void measure_logits(const Options& options, const engine::Model& model,
                    const std::vector<int>& window, std::vector<Row>& rows) {
  engine::for_each_task(static_cast<Index>(rows.size()), [&](Index task) {
    Row& row = rows[static_cast<std::size_t>(task)];
    if (row.method.key_round_trips.empty()) return;
    const auto error =
        engine::logit_error(model, row.method.key_round_trips, window, options.window);
    row.logit_rms = error.rms();
    row.logit_relative = error.relative();
  });
}

void measure_retrieval(const Options& options, const engine::Model& model,
                       const engine::Tokenizer& tokenizer, const std::vector<int>& text,
                       std::vector<Row>& rows) {
  const std::size_t num_tasks = rows.size() * static_cast<std::size_t>(options.questions);
  std::vector<char> retrieved(num_tasks);
  TaskCount count("Retrieval", num_tasks);
  engine::for_each_task(static_cast<Index>(num_tasks), [&](Index task) {
    const auto at = static_cast<std::size_t>(task);
    const Row& row = rows[at % rows.size()];
    const auto question = engine::retrieval_case(tokenizer, text, options.context, options.seed,
                                                 static_cast<int>(at / rows.size()));
    const auto cache = row.method.new_cache();
    retrieved[at] = engine::retrieves(model, tokenizer, *cache, question);
    count.ended(row.method.name);
  });
  for (std::size_t at = 0; at < num_tasks; ++at) rows[at % rows.size()].retrieved += retrieved[at];
}

void print_table(const Options& options, std::size_t num_windows, const engine::Model& model,
                 const std::vector<Row>& rows) {
  std::printf("%zu contexts of %d tokens, the newest %lld exact\n\n", num_windows, options.context,
              static_cast<long long>(options.window));
  std::printf("%-20s %7s %10s %9s %7s %11s %9s %9s %8s %10s\n", "cache", "bits", "perplexity",
              "increase", "top-1", "logit error", "retrieval", "B/token", "vs fp16", "allocated");
  const double numbers = 2.0 * model.config().kv_size() * model.config().num_layers;
  for (const Row& row : rows)
    std::printf("%-20s %7.3f %10.3f %8.2f%% %6.1f%% %10.1f%% %6d/%-2d %9.1f %7.2fx %10s\n",
                row.method.name.c_str(), row.method.bits_per_number, row.perplexity,
                100 * (row.perplexity / rows[0].perplexity - 1), 100 * row.top1_agreement,
                100 * row.logit_relative, row.retrieved, options.questions,
                row.method.bits_per_number * numbers / 8, row.ratio(),
                row.method.packed ? engine::human_bytes(double(row.allocated_bytes)).c_str() : "-");
}

void write_json(const Options& options, std::size_t num_windows, const engine::Model& model,
                const std::vector<Row>& rows) {
  nlohmann::json caches = nlohmann::json::array();
  const double numbers = 2.0 * model.config().kv_size() * model.config().num_layers;
  for (const Row& row : rows) {
    caches.push_back({{"cache", row.method.name},
                      {"bits_per_number", row.method.bits_per_number},
                      {"perplexity", row.perplexity},
                      {"perplexity_increase", row.perplexity / rows[0].perplexity - 1},
                      {"top1_agreement", row.top1_agreement},
                      {"logit_rms_error", row.logit_rms},
                      {"logit_relative_error", row.logit_relative},
                      {"retrieved", row.retrieved},
                      {"bytes_per_token", row.method.bits_per_number * numbers / 8},
                      {"ratio_to_fp16", row.ratio()}});
    if (row.method.packed) caches.back()["allocated_bytes"] = row.allocated_bytes;
  }
  const nlohmann::json report = {{"model", options.model},  {"context", options.context},
                                 {"contexts", num_windows}, {"window", options.window},
                                 {"sinks", options.sinks},  {"questions", options.questions},
                                 {"seed", options.seed},    {"caches", caches}};
  std::ofstream file(options.json);
  file << report.dump(2) << "\n";
  commvq::require(file.flush().good(), "cannot write ", options.json);
}

int evaluate(const Options& options) {
  const engine::Model model(options.model);
  const engine::Tokenizer tokenizer(std::filesystem::path(options.model) / "tokenizer.json");
  std::vector<Row> rows = make_rows(options, model, tokenizer);
  const std::vector<int> text = text_of(options, model, tokenizer);
  const auto windows = engine::windows_of(text, options.context, options.windows);
  measure_perplexity(model, windows, rows);
  measure_logits(options, model, windows[0], rows);
  measure_retrieval(options, model, tokenizer, text, rows);
  print_table(options, windows.size(), model, rows);
  if (!options.json.empty()) write_json(options, windows.size(), model, rows);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("Measures the quality of compressed KV caches against the exact one.");
  app.add_option("MODEL", options.model, "Folder of a Hugging Face Llama model")->required();
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
  app.add_option("--context", options.context, "Tokens of one context")
      ->check(CLI::Range(64, 1 << 20))
      ->capture_default_str();
  app.add_option("--contexts", options.windows, "Contexts to measure; 0: the whole text")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  app.add_option("--questions", options.questions, "Retrieval questions")
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
  app.add_option("--json", options.json, "Also write the results to this file");
  CLI11_PARSE(app, argc, argv);
  return engine::run_program([&] {
    commvq::require(options.self || !options.text.empty(), "give --text FILE or --self");
    return evaluate(options);
  });
}
