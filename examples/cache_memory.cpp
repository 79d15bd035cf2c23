// What the cache of a model takes at each preset, by the library's own account: no weights needed.
#include <cstdio>

#include "commvq/commvq.hpp"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "engine/console.hpp"

namespace {

using commvq::Index;

struct Options {
  int layers = 32, kv_heads = 8, head_dim = 128;  ///< Llama-3.1-8B
  Index context = 131072, window = 128;
  bool json = false;
};

/// A cache of one layer whose codecs are all zeros: its sizes are those of any codecs of the shape.
commvq::LayerCache layer_cache(const commvq::CacheConfig& config,
                               const commvq::KeyCodecConfig& keys,
                               const commvq::ValueCodecConfig& values) {
  const auto B = static_cast<std::size_t>(values.num_blocks);
  const auto C = static_cast<std::size_t>(values.num_channels) / B;
  const auto H = static_cast<std::size_t>(values.hidden_size);
  const auto L = static_cast<std::size_t>(values.num_logits());
  commvq::ValueCodecWeights weights;
  weights.norm_gain.assign(B * C, 0);
  weights.norm_bias.assign(B * C, 0);
  weights.hidden_weight.assign(B * H * C, 0);
  weights.hidden_bias.assign(B * H, 0);
  weights.output_weight.assign(L * H, 0);
  weights.output_bias.assign(L, 0);
  weights.decoder.assign(static_cast<std::size_t>(values.num_code_bits()) * C, 0);
  const std::vector<commvq::KeyCodebook<float>> heads(static_cast<std::size_t>(config.num_kv_heads),
                                                      commvq::KeyCodebook<float>(keys));
  return {config,
          {std::make_shared<commvq::KeyCodec>(heads),
           std::make_shared<commvq::ValueCodec>(values, std::move(weights))}};
}

int print_memory(const Options& options) {
  commvq::CacheConfig config;
  config.rope.pairs.head_dim = config.rope.pairs.rotary_dim = options.head_dim;
  config.num_kv_heads = options.kv_heads;
  config.window = options.window;
  const commvq::PairLayout& pairs = config.rope.pairs;
  const int channels = static_cast<int>(config.num_channels());
  struct Row {
    const char* name;
    double bytes_per_token;  ///< of one layer
    double window_bytes;     ///< of one layer: exact copies
  };
  const double exact = commvq::LayerCache(config, {}).bytes_per_token();
  const double window_bytes = exact * double(options.window);
  std::vector<Row> rows = {{"exact", exact, 0}};
  using commvq::KeyCodecConfig;
  using commvq::ValueCodecConfig;
  const auto add = [&](const char* name, const KeyCodecConfig& keys,
                       const ValueCodecConfig& values) {
    rows.push_back({name, layer_cache(config, keys, values).bytes_per_token(), window_bytes});
  };
  add("commvq_2bit", KeyCodecConfig::commvq_2bit(pairs), ValueCodecConfig::commvq_2bit(channels));
  add("speed_2bit", KeyCodecConfig::speed_2bit(pairs),
      ValueCodecConfig::speed_2bit(channels, config.num_kv_heads));
  add("paper_2bit", KeyCodecConfig::paper_2bit(pairs), ValueCodecConfig::paper_2bit(channels));
  add("commvq_1bit", KeyCodecConfig::commvq_1bit(pairs), ValueCodecConfig::commvq_1bit(channels));
  add("speed_1bit", KeyCodecConfig::speed_1bit(pairs),
      ValueCodecConfig::speed_1bit(channels, config.num_kv_heads));
  add("paper_1bit", KeyCodecConfig::paper_1bit(pairs), ValueCodecConfig::paper_1bit(channels));

  nlohmann::json list = nlohmann::json::array();
  for (const Row& row : rows) {
    const double at_context =
        options.layers * (row.bytes_per_token * double(options.context) + row.window_bytes);
    if (!options.json)
      std::printf("%-12s %9.3f bytes a token and layer, 1/%-6.2f %s at %lld tokens\n", row.name,
                  row.bytes_per_token, exact / row.bytes_per_token,
                  engine::human_bytes(at_context).c_str(), static_cast<long long>(options.context));
    list.push_back({{"cache", row.name},
                    {"bytes_per_token", row.bytes_per_token * options.layers},
                    {"window_bytes", row.window_bytes * options.layers}});
  }
  if (options.json) std::printf("%s\n", list.dump(1).c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("Prints what the cache of a model of a given shape takes at each preset.");
  app.add_option("--layers", options.layers, "Layers")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  app.add_option("--kv-heads", options.kv_heads, "KV heads of a layer")
      ->check(CLI::Range(1, 512))
      ->capture_default_str();
  app.add_option("--head-dim", options.head_dim, "Channels of a head")
      ->check(CLI::Range(2, 1024))
      ->capture_default_str();
  app.add_option("--context", options.context, "Tokens in the cache")
      ->check(CLI::Range(1, 1 << 30))
      ->capture_default_str();
  app.add_option("--window", options.window, "Newest tokens that stay exact as well")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  app.add_flag("--json", options.json, "All layers together, as JSON");
  CLI11_PARSE(app, argc, argv);
  return engine::run_program([&] { return print_memory(options); });
}
