// Codebook files: what loads must be usable, and saved and loaded again be the same file.
#include "fuzz/input_file.hpp"
#include "fuzz/use_codecs.hpp"

namespace {

using namespace commvq;

/// Of the file: a book of two by two numbers in F16 takes 8 bytes there, and an encoder here.
constexpr std::size_t kMemoryMultiple = 128;

void check_round_trip(const ModelCodecs& codecs, const fuzz::InputFile& file) {
  const std::filesystem::path first = file.folder() / "first", second = file.folder() / "second";
  save_codecs(first, codecs);
  save_codecs(second, load_codecs(first));
  fuzz::demand(fuzz::bytes_of(first) == fuzz::bytes_of(second),
               "codecs that change in being saved");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const fuzz::InputFile file("input.safetensors");
  file.write({data, size});
  ModelCodecs codecs;
  if (!fuzz::accepts(size, kMemoryMultiple, [&] { codecs = load_codecs(file.path()); })) return 0;
  fuzz::use_codecs(codecs);
  check_round_trip(codecs, file);
  return 0;
}
