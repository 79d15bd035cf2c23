// The index of a sharded checkpoint, beside one good shard.
#include "commvq/io/safetensors.hpp"

#include "fuzz/harness.hpp"
#include "fuzz/input_file.hpp"

namespace {

using namespace commvq;

constexpr std::size_t kMemoryMultiple = 64;

/// A folder whose index is the input and whose only shard holds the tensors "a" and "b".
const fuzz::InputFile& folder_with_shard() {
  static const fuzz::InputFile index("model.safetensors.index.json");
  static const bool written = [] {
    SafetensorsWriter writer;
    const float values[] = {1, 2, 3};
    writer.add("a", {3}, values);
    writer.add("b", {1, 3}, values);
    writer.write(index.folder() / "s.safetensors");
    return true;
  }();
  (void)written;
  return index;
}

void read_all(const std::filesystem::path& folder) {
  const Checkpoint checkpoint(folder);
  for (const std::string& name : checkpoint.names())
    fuzz::demand(checkpoint.contains(name) && checkpoint.at(name).to_floats().size() == 3,
                 "a tensor that is none of the shard's");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const fuzz::InputFile& index = folder_with_shard();
  index.write({data, size});
  fuzz::accepts(size, kMemoryMultiple, [&] { read_all(index.folder()); });
  return 0;
}
