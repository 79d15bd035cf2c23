// Saved caches: every input as it is, and with length and digests made to fit, which alone lets a
// changed file come past its checksums. What loads must be usable, and saved and loaded again be
// the same file.
#include <cstring>
#include <vector>

#include "commvq/io/saved_cache.hpp"

#include "fuzz/input_file.hpp"
#include "fuzz/use_codecs.hpp"
#include "reference/crafted_cache.hpp"
#include "reference/small_cache.hpp"

namespace {

using namespace commvq;

constexpr std::size_t kMemoryMultiple = 4;
constexpr char kTag[] = "tag";

const std::vector<LayerCodec>& codecs() {
  static const std::vector<LayerCodec> codecs = testing_support::small_codecs();
  return codecs;
}

Cache load(const std::filesystem::path& path) {
  // The codecs' tables live as long as a cache of theirs does.
  static const Cache other(testing_support::small_config(), codecs());
  return load_cache(path, testing_support::small_config(), codecs(), kTag);
}

void check_round_trip(const Cache& cache, const fuzz::InputFile& file) {
  const std::filesystem::path first = file.folder() / "first", second = file.folder() / "second";
  save_cache(first, cache, kTag);
  save_cache(second, load(first), kTag);
  fuzz::demand(fuzz::bytes_of(first) == fuzz::bytes_of(second),
               "a cache that changes in being saved");
}

void check(std::span<const std::uint8_t> bytes, const fuzz::InputFile& file) {
  file.write(bytes);
  std::vector<Cache> loaded;
  if (!fuzz::accepts(bytes.size(), kMemoryMultiple, [&] { loaded.push_back(load(file.path())); }))
    return;
  check_round_trip(loaded[0], file);
  testing_support::Rng rng(3);
  for (int i = 0; i < loaded[0].num_layers(); ++i) fuzz::use_cache(loaded[0].layer(i), rng, 20);
}

/// Writes the length of the file, the digests of the codecs (their last digits, and so their
/// digests, differ by compiler; seeds should not) and those of what is in the file.
void make_fit(std::span<std::uint8_t> bytes) {
  detail::CachePreamble preamble;
  if (bytes.size() < sizeof preamble) return;
  std::memcpy(&preamble, bytes.data(), sizeof preamble);
  preamble.file_bytes = bytes.size();
  std::memcpy(bytes.data(), &preamble, sizeof preamble);
  std::size_t at = sizeof preamble + std::size_t{detail::kCacheHeaderBytes};
  for (const LayerCodec& codec : codecs()) {
    const Digest digests[] = {codec.keys ? codec.keys->digest() : Digest{},
                              codec.values ? codec.values->digest() : Digest{}};
    if (at + sizeof digests <= bytes.size())
      std::memcpy(bytes.data() + at, digests, sizeof digests);
    at += std::size_t{detail::kLayerRecordBytes};
  }
  testing_support::repair_digests(bytes);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const fuzz::InputFile file("input.cache");
  check({data, size}, file);
  std::vector<std::uint8_t> crafted(data, data + size);
  make_fit(crafted);
  check(crafted, file);
  return 0;
}
