// Measures what compressed caches cost in quality: perplexity, agreement, logit error, retrieval.
#include <cmath>
#include <cstdio>
#include <fstream>

#include "commvq/commvq.hpp"
#include "commvq/cuda/integer_codebook.hpp"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "engine/console.hpp"
#include "engine/evaluation.hpp"
#include "engine/generate.hpp"
#include "engine/logit_error.hpp"
#include "engine/text_file.hpp"

namespace {

using engine::Index;

struct Options {
  std::string model, text, json;
  bool self = false;
  std::vector<std::string> codebooks;
  bool device_keys = false;
  int context = 4096;
  int windows = 4;
  int questions = 20;
  Index window = 128, sinks = 0;
  std::uint64_t seed = 2;
};

/// One way to store the cache, and what was measured of it.
struct Row {
  std::string name;
  std::vector<commvq::LayerCodec> codecs;
  double perplexity = 0, top1_agreement = 0, logit_rms = 0, logit_relative = 0;
  double bytes_per_token = 0;  ///< of all layers, coded tokens
  double ratio = 0;            ///< FP16 over coded
  Index allocated_bytes = 0;   ///< after one context
  int retrieved = 0;
};

/// The same codecs with key codebooks rounded to integers, as CUDA devices read them.
Row device_row(const Row& row) {
  Row rounded = row;
  rounded.name += " integer keys";
  for (commvq::LayerCodec& layer : rounded.codecs) {
    commvq::require(layer.keys && layer.values, "--device-keys: codebooks ", row.name,
                    " leave a side of a layer exact; devices need both coded");
    const commvq::cuda::DevicePageLayout layout(layer.keys->config(), layer.keys->num_kv_heads(),
                                                layer.values->config(), /*page_size=*/64,
                                                commvq::cuda::key_plane_bytes(90));
    layer.keys =
        std::make_shared<commvq::KeyCodec>(commvq::cuda::rounded_to_integers(*layer.keys, layout));
  }
  return rounded;
}

std::vector<Row> make_rows(const Options& options, const engine::Model& model) {
  std::vector<Row> rows(1);
  rows[0].name = "exact fp16";
  for (const std::string& path : options.codebooks) {
    commvq::ModelCodecs codecs = commvq::load_codecs(path);
    codecs.require_model(model.config().rope, model.config().num_kv_heads,
                         model.config().num_layers, model.digest());
    Row row;
    row.name = std::filesystem::path(path).stem().string();
    row.codecs = std::move(codecs.layers);
    rows.push_back(std::move(row));
    if (options.device_keys) rows.push_back(device_row(rows.back()));
  }
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

void measure_storage(const engine::Model& model, const commvq::Cache& cache, Row& row) {
  for (int layer = 0; layer < cache.num_layers(); ++layer)
    row.bytes_per_token += cache.layer(layer).bytes_per_token();
  row.ratio = 4.0 * model.config().kv_size() * cache.num_layers() / row.bytes_per_token;
  row.allocated_bytes = cache.allocated_bytes();
}

void measure_perplexity(const Options& options, const engine::Model& model,
                        const std::vector<std::vector<int>>& windows, std::vector<Row>& rows) {
  engine::ProgressLine progress("Perplexity");
  std::vector<std::vector<int>> exact_best;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    double nll = 0, same = 0, count = 0;
    for (std::size_t w = 0; w < windows.size(); ++w) {
      progress.update(double(r * windows.size() + w) / double(rows.size() * windows.size()),
                      rows[r].name);
      commvq::Cache cache = model.make_cache(rows[r].codecs, options.window, options.sinks);
      const engine::Predictions predicted = engine::predict(model, cache, windows[w]);
      if (r == 0) exact_best.push_back(predicted.best);
      for (std::size_t i = 0; i < predicted.nll.size(); ++i) {
        nll += predicted.nll[i];
        same += predicted.best[i] == exact_best[w][i];
      }
      count += double(predicted.nll.size());
      if (w == 0) measure_storage(model, cache, rows[r]);
    }
    rows[r].perplexity = std::exp(nll / count);
    rows[r].top1_agreement = same / count;
  }
}

void measure_logits(const Options& options, const engine::Model& model,
                    const std::vector<int>& window, std::vector<Row>& rows) {
  for (Row& row : rows) {
    if (row.codecs.empty()) continue;
    const auto error = engine::logit_error(model, row.codecs, window, options.window);
    row.logit_rms = error.rms();
    row.logit_relative = error.relative();
  }
}

void measure_retrieval(const Options& options, const engine::Model& model,
                       const engine::Tokenizer& tokenizer, const std::vector<int>& text,
                       std::vector<Row>& rows) {
  engine::ProgressLine progress("Retrieval");
  for (int i = 0; i < options.questions; ++i) {
    const auto question = engine::retrieval_case(tokenizer, text, options.context, options.seed, i);
    for (Row& row : rows) {
      progress.update(double(i) / options.questions, row.name);
      commvq::Cache cache = model.make_cache(row.codecs, options.window, options.sinks);
      row.retrieved += engine::retrieves(model, tokenizer, cache, question);
    }
  }
}

void print_table(const Options& options, std::size_t num_windows, const std::vector<Row>& rows) {
  std::printf("%zu contexts of %d tokens, the newest %lld exact\n\n", num_windows, options.context,
              static_cast<long long>(options.window));
  std::printf("%-16s %10s %9s %8s %11s %11s %9s %9s %11s\n", "cache", "perplexity", "increase",
              "top-1", "logit error", "retrieval", "B/token", "vs fp16", "allocated");
  for (const Row& row : rows)
    std::printf("%-16s %10.3f %8.2f%% %7.1f%% %10.1f%% %8d/%-2d %9.1f %8.2fx %11s\n",
                row.name.c_str(), row.perplexity, 100 * (row.perplexity / rows[0].perplexity - 1),
                100 * row.top1_agreement, 100 * row.logit_relative, row.retrieved,
                options.questions, row.bytes_per_token, row.ratio,
                engine::human_bytes(double(row.allocated_bytes)).c_str());
}

void write_json(const Options& options, std::size_t num_windows, const std::vector<Row>& rows) {
  nlohmann::json caches = nlohmann::json::array();
  for (const Row& row : rows)
    caches.push_back({{"cache", row.name},
                      {"perplexity", row.perplexity},
                      {"perplexity_increase", row.perplexity / rows[0].perplexity - 1},
                      {"top1_agreement", row.top1_agreement},
                      {"logit_rms_error", row.logit_rms},
                      {"logit_relative_error", row.logit_relative},
                      {"retrieved", row.retrieved},
                      {"bytes_per_token", row.bytes_per_token},
                      {"ratio_to_fp16", row.ratio},
                      {"allocated_bytes", row.allocated_bytes}});
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
  std::vector<Row> rows = make_rows(options, model);
  const std::vector<int> text = text_of(options, model, tokenizer);
  const auto windows =
      engine::windows_of(text, options.context, options.windows, tokenizer.prefix());
  measure_perplexity(options, model, windows, rows);
  measure_logits(options, model, windows[0], rows);
  measure_retrieval(options, model, tokenizer, text, rows);
  print_table(options, windows.size(), rows);
  if (!options.json.empty()) write_json(options, windows.size(), rows);
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
