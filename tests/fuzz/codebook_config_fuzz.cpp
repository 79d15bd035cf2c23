// The configuration in a codebook file, whose tensors are those of the example.
#include "commvq/io/safetensors.hpp"

#include "fuzz/example_codecs.hpp"
#include "fuzz/input_file.hpp"
#include "fuzz/use_codecs.hpp"

namespace {

using namespace commvq;

constexpr std::size_t kMemoryMultiple = 128;

/// Writes the example's tensors with `config` in place of their configuration.
void write_with_config(const std::string& config, const fuzz::InputFile& file) {
  static const std::filesystem::path example_path = file.folder() / "example";
  static const SafetensorsFile example = [] {
    save_codecs(example_path, fuzz::example_codecs());
    return SafetensorsFile(example_path);
  }();
  SafetensorsWriter writer;
  for (const auto& [name, tensor] : example.tensors())
    writer.add(name, tensor.dtype, tensor.shape, tensor.data);
  for (const auto& [key, value] : example.metadata()) writer.set_metadata(key, value);
  writer.set_metadata("config", config);
  writer.write(file.path());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const fuzz::InputFile file("input.safetensors");
  try {
    write_with_config({reinterpret_cast<const char*>(data), size}, file);
  } catch (const Error&) {
    return 0;  // not UTF-8: no file can hold it
  }
  ModelCodecs codecs;
  const auto file_bytes = static_cast<std::size_t>(std::filesystem::file_size(file.path()));
  if (fuzz::accepts(file_bytes, kMemoryMultiple, [&] { codecs = load_codecs(file.path()); }))
    fuzz::use_codecs(codecs);
  return 0;
}
