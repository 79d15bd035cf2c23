// Continues a prompt with an exact or a compressed KV cache and says what the cache costs.
#include "engine/generate.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "commvq/commvq.hpp"

#include <CLI/CLI.hpp>

#include "engine/cache_method.hpp"
#include "engine/console.hpp"
#include "engine/device_cache.hpp"
#include "engine/tokenizer.hpp"

namespace {

struct Options {
  std::string model, codebooks, prompt, cache = "commvq", device = "cpu";
  int max_tokens = 200;
  engine::Index window = 128, sinks = 0;
  engine::SamplerOptions sampler;
};

/// What a finished cache takes, and what FP16 would.
void print_size(const engine::Model& model, commvq::Index length, commvq::Index allocated) {
  const auto fp16 = 4.0 * model.config().kv_size() * double(model.config().num_layers * length);
  const auto bytes = static_cast<double>(allocated);
  std::printf("\n\n%lld tokens in the cache: %s allocated, FP16 would take %s (%.2fx)\n",
              static_cast<long long>(length), engine::human_bytes(bytes).c_str(),
              engine::human_bytes(fp16).c_str(), fp16 / bytes);
}

void print_cost(const engine::Model& model, const commvq::Cache& cache) {
  print_size(model, cache.length(), cache.allocated_bytes());
  const commvq::LayerCache& first = cache.layer(0);
  const auto coded = static_cast<long long>(first.coded_end() - first.sinks_end());
  const double bits = engine::bits_per_number(cache, model.config().kv_size());
  std::printf("%lld of them coded, %.3f bytes each a layer: 1/%.2f of FP16\n", coded,
              bits * model.config().kv_size() / 4, 16 / bits);
}

int generate(const Options& options) {
  const engine::Model model(options.model);
  const engine::Tokenizer tokenizer(std::filesystem::path(options.model) / "tokenizer.json");
  std::vector<commvq::LayerCodec> codecs;
  if (options.cache == "commvq") {
    commvq::require(!options.codebooks.empty(), "--cache commvq needs --codebooks FILE; ",
                    "calibrate writes one");
    commvq::ModelCodecs file = commvq::load_codecs(options.codebooks);
    file.require_model(model.config().rope, model.config().num_kv_heads, model.config().num_layers,
                       model.digest());
    codecs = std::move(file.layers);
  }
  std::vector<int> prompt = tokenizer.prefix();
  const std::vector<int> text = tokenizer.encode(options.prompt);
  prompt.insert(prompt.end(), text.begin(), text.end());
  commvq::Cache cache = model.make_cache(codecs, options.window, options.sinks);
  std::unique_ptr<engine::SequenceCache> device_cache;
  if (options.device == "cuda") {
    commvq::require(options.cache == "commvq", "--device cuda needs --cache commvq");
    device_cache = engine::make_device_cache(
        model.config(), codecs, static_cast<engine::Index>(prompt.size()) + options.max_tokens,
        static_cast<int>(options.window), static_cast<int>(options.sinks));
  }
  const engine::CacheHandle handle =
      device_cache ? engine::CacheHandle(*device_cache) : engine::CacheHandle(cache);
  engine::Sampler sampler(options.sampler);
  engine::StreamingDecoder decoder(tokenizer);

  std::printf("%s", options.prompt.c_str());
  const std::vector<int>& stop = model.config().stop_tokens;
  const auto start = std::chrono::steady_clock::now();
  const auto tokens =
      engine::generate(model, handle, prompt, options.max_tokens, sampler, stop, [&](int token) {
        if (std::find(stop.begin(), stop.end(), token) != stop.end()) return true;
        std::printf("%s", decoder.add(token).c_str());
        std::fflush(stdout);
        return true;
      });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("%s", decoder.finish().c_str());
  if (device_cache) {
    print_size(model, device_cache->length(), device_cache->allocated_bytes());
  } else {
    print_cost(model, cache);
  }
  std::printf("%.1f tokens/s, prompt included\n", double(tokens.size()) / seconds.count());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("Continues a prompt with an exact or a compressed KV cache.");
  app.add_option("MODEL", options.model, "Folder of a Hugging Face Llama, Mistral or Qwen model")
      ->required();
  app.add_option("--codebooks", options.codebooks, "Codebook file that calibrate wrote");
  app.add_option("--prompt", options.prompt, "Text to continue")->required();
  app.add_option("--cache", options.cache, "exact (FP16) or commvq")
      ->check(CLI::IsMember({"exact", "commvq"}))
      ->capture_default_str();
  app.add_option("--device", options.device,
                 "Where attention over the compressed cache runs: cpu or cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  app.add_option("--max-tokens", options.max_tokens, "Most tokens to write")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  app.add_option("--window", options.window, "Newest tokens that stay exact")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  app.add_option("--sinks", options.sinks, "First tokens that stay exact")
      ->check(CLI::Range(0, 1 << 24))
      ->capture_default_str();
  app.add_option("--temperature", options.sampler.temperature, "0 takes the most probable token")
      ->capture_default_str();
  app.add_option("--top-k", options.sampler.top_k, "Sample among so many tokens; 0: all")
      ->capture_default_str();
  app.add_option("--top-p", options.sampler.top_p, "Sample among tokens of this probability")
      ->capture_default_str();
  app.add_option("--seed", options.sampler.seed, "Seed of the sampling")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  return engine::run_program([&] { return generate(options); });
}
