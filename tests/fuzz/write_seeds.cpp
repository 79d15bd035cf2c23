// Writes the inputs that fuzzing begins with: FOLDER/<harness>/<name>. Those of tests/fuzz/corpus
// are its output.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "commvq/io/safetensors.hpp"
#include "commvq/io/saved_cache.hpp"

#include <nlohmann/json.hpp>

#include "fuzz/byte_tokenizer.hpp"
#include "fuzz/example_codecs.hpp"
#include "reference/small_cache.hpp"

namespace {

using namespace commvq;
using nlohmann::json;
namespace fs = std::filesystem;

fs::path root;

/// The path of a seed, in a folder that exists.
fs::path seed(const std::string& harness, const std::string& name) {
  fs::create_directories(root / harness);
  return root / harness / name;
}

void write(const fs::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

void write_safetensors() {
  SafetensorsWriter every_type;
  const std::vector<std::uint8_t> bytes(16, 1);
  for (const Dtype dtype : {Dtype::kBool, Dtype::kI8, Dtype::kU16, Dtype::kF16, Dtype::kBf16,
                            Dtype::kF32, Dtype::kI64, Dtype::kF64})
    every_type.add(name_of(dtype), dtype, {1, 2},
                   std::span(bytes).first(static_cast<std::size_t>(2 * size_of(dtype))));
  every_type.set_metadata("format", "pt");
  every_type.write(seed("safetensors", "types"));
  SafetensorsWriter().write(seed("safetensors", "empty"));
  SafetensorsWriter scalar;
  scalar.add("scalar", Dtype::kU8, {}, std::span(bytes).first(1));
  scalar.add("none", Dtype::kF32, {3, 0}, {});
  scalar.write(seed("safetensors", "scalar"));
}

void write_checkpoints() {
  const json both = {{"metadata", {{"total_size", 24}}},
                     {"weight_map", {{"a", "s.safetensors"}, {"b", "s.safetensors"}}}};
  write(seed("checkpoint", "both"), both.dump());
  write(seed("checkpoint", "one"), json{{"weight_map", {{"b", "s.safetensors"}}}}.dump(1));
  write(seed("checkpoint", "escape"), json{{"weight_map", {{"a", "../s.safetensors"}}}}.dump());
}

/// `codecs` as a file, and its configuration alone.
void write_codecs(const std::string& name, const ModelCodecs& codecs) {
  const fs::path path = seed("codebook_file", name);
  save_codecs(path, codecs);
  write(seed("codebook_config", name), SafetensorsFile(path).metadata().at("config"));
}

void write_codebooks() {
  const ModelCodecs all = fuzz::example_codecs();
  write_codecs("all", all);
  for (std::size_t i = 0; i < all.layers.size(); ++i) {
    ModelCodecs one = all;
    one.layers = {all.layers[i]};
    write_codecs("layer" + std::to_string(i), one);
  }
  write_codecs("graded", fuzz::graded_codecs());
  ModelCodecs scaled = all;
  scaled.layers = {{nullptr, nullptr}};
  scaled.rope.scaling = RopeScaling::kLlama3;
  scaled.rope.factor = 8;
  write_codecs("scaled", scaled);
}

void write_tokenizers() {
  const json plain = fuzz::byte_tokenizer();
  write(seed("tokenizer_file", "bytes"), plain.dump());
  json split = plain;
  split["pre_tokenizer"] = {
      {"type", "Sequence"},
      {"pretokenizers",
       {{{"type", "Split"},
         {"pattern", {{"Regex", R"(\p{N}{1,3}|\s+(?!\S)|[^\s]+)"}}},
         {"behavior", "Isolated"},
         {"invert", false}},
        {{"type", "ByteLevel"}, {"add_prefix_space", true}, {"use_regex", false}}}}};
  split["model"]["ignore_merges"] = true;
  write(seed("tokenizer_file", "split"), split.dump());
  json joined = plain;  // merges as "a b"
  for (json& merge : joined["model"]["merges"])
    merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
  write(seed("tokenizer_file", "joined"), joined.dump());
  write(seed("tokenizer_text", "words"), " ab abab, it's 123 o'clock\n\n  <end><end>> end");
  write(seed("tokenizer_text", "unicode"), "\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80 \xc2\xa0");
}

void write_configs() {
  const json llama = {{"model_type", "llama"},    {"hidden_size", 32},
                      {"intermediate_size", 64},  {"num_hidden_layers", 2},
                      {"num_attention_heads", 4}, {"num_key_value_heads", 2},
                      {"vocab_size", 300},        {"max_position_embeddings", 512},
                      {"rms_norm_eps", 1e-5},     {"rope_theta", 10000.0},
                      {"hidden_act", "silu"},     {"tie_word_embeddings", true}};
  write(seed("model_config", "llama"), llama.dump(1));
  json scaled = llama;
  scaled["head_dim"] = 16;
  scaled["rope_scaling"] = {{"rope_type", "llama3"},
                            {"factor", 8.0},
                            {"low_freq_factor", 1.0},
                            {"high_freq_factor", 4.0},
                            {"original_max_position_embeddings", 8192}};
  write(seed("model_config", "llama3"), scaled.dump());
  json linear = llama;
  linear["partial_rotary_factor"] = 0.5;
  linear["rope_parameters"] = {{"type", "linear"}, {"factor", 2.0}, {"rope_theta", 1000}};
  write(seed("model_config", "linear"), linear.dump());
}

void write_caches() {
  const CacheConfig config = testing_support::small_config();
  save_cache(seed("saved_cache", "none"), Cache(config, testing_support::small_codecs()), "tag");
  for (const Index tokens : {1, 4, 9, 30})
    save_cache(seed("saved_cache", "tokens" + std::to_string(tokens)),
               testing_support::random_cache(config, tokens, 6), "tag");
  Cache truncated = testing_support::random_cache(config, 30, 7);
  truncated.truncate(22);
  save_cache(seed("saved_cache", "truncated"), truncated, "tag");
}

/// Inputs of harnesses that read rows of numbers.
void write_calls() {
  write(seed("dlpack", "matrix"), std::string("\0\4\6\1\1\6\1\1\1", 9));
  write(seed("dlpack", "heads"), std::string("\200\3\2\4\1\10\4\1\1", 9));
  // Defaults; append 20 tokens, attend with 1 query, fork, append again, truncate, attend.
  const std::string append("\0\144\145\146\147\144\145\143\147\24\0\0\0\0\0\0\0\0\0", 19);
  const std::string attend("\2\144\145\146\147\1\0\0\0\0\0\0\0\0\0\0\0", 17);
  write(seed("c_api", "generate"), std::string(1, '\0') + append + attend + '\5' + append + attend +
                                       std::string("\4\12", 2) + append + attend + "\7");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: write_seeds FOLDER\n");
    return 2;
  }
  root = argv[1];
  write_safetensors();
  write_checkpoints();
  write_codebooks();
  write_tokenizers();
  write_configs();
  write_caches();
  write_calls();
}
