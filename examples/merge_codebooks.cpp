// Joins codebook files of some layers each, written by `calibrate --layers`, into one.
#include <cstdio>

#include <CLI/CLI.hpp>

#include "engine/codec_parts.hpp"
#include "engine/console.hpp"

int main(int argc, char** argv) {
  std::vector<std::string> paths;
  std::string out;
  CLI::App app("Joins what calibrate --layers wrote into one codebook file.");
  app.add_option("PART", paths, "Codebook files that hold each layer once between them")
      ->required();
  app.add_option("--out", out, "Codebook file to write")->required();
  CLI11_PARSE(app, argc, argv);
  return engine::run_program([&] {
    std::vector<engine::CodecPart> parts;
    parts.reserve(paths.size());
    for (const std::string& path : paths) parts.push_back({path, commvq::load_codecs(path)});
    const commvq::ModelCodecs whole = engine::merge_parts(parts);
    commvq::save_codecs(out, whole);
    std::printf("%s: %zu layers of %zu parts\n", out.c_str(), whole.layers.size(), parts.size());
    return 0;
  });
}
