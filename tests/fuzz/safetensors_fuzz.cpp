// The safetensors reader on any bytes: what it accepts must be readable to the last byte.
#include "commvq/io/safetensors.hpp"

#include "fuzz/harness.hpp"
#include "fuzz/input_file.hpp"

namespace {

using namespace commvq;

/// Of the file: JSON values, names and shapes of a header of the shortest entries.
constexpr std::size_t kMemoryMultiple = 64;

void read_all(const SafetensorsFile& file) {
  unsigned sum = 0;
  for (const auto& [name, tensor] : file.tensors()) {
    fuzz::demand(
        tensor.num_elements() * size_of(tensor.dtype) == static_cast<Index>(tensor.data.size()),
        "a tensor whose elements and bytes disagree");
    for (const std::uint8_t byte : tensor.data) sum += byte;
    fuzz::demand(&file.at(name) == &tensor, "a tensor that its name does not find");
    const bool floats = tensor.dtype == Dtype::kF16 || tensor.dtype == Dtype::kBf16 ||
                        tensor.dtype == Dtype::kF32 || tensor.dtype == Dtype::kF64;
    if (floats)
      fuzz::demand(
          static_cast<Index>(tensor.to_floats(tensor.shape).size()) == tensor.num_elements(),
          "a tensor that converts to another number of floats");
  }
  volatile unsigned read = sum;  // every byte
  (void)read;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const fuzz::InputFile file("input.safetensors");
  file.write({data, size});
  fuzz::accepts(size, kMemoryMultiple, [] { read_all(SafetensorsFile(file.path())); });
  return 0;
}
