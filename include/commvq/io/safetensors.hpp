#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "commvq/core/export.h"
#include "commvq/core/view.hpp"

namespace commvq {
namespace detail {
class FileLayer;
}

/// Element types of a safetensors file that this library reads and writes.
enum class Dtype { kBool, kU8, kI8, kU16, kI16, kU32, kI32, kU64, kI64, kF16, kBf16, kF32, kF64 };

COMMVQ_API const char* name_of(Dtype dtype);  ///< as the format spells it, e.g. "BF16"
COMMVQ_API Index size_of(Dtype dtype);        ///< bytes of one element

/// One tensor of a mapped file: `data` lives as long as the file or checkpoint it came from, and
/// need not be aligned.
struct COMMVQ_API TensorView {
  std::string name;
  Dtype dtype = Dtype::kF32;
  std::vector<Index> shape;
  std::span<const std::uint8_t> data;

  Index num_elements() const;
  /// Converts F16, BF16, F32 or F64 to floats. Throws `Error` for any other type and, if `expected`
  /// is given, for any other shape.
  std::vector<float> to_floats() const;
  std::vector<float> to_floats(const std::vector<Index>& expected_shape) const;
};

/// A safetensors file mapped into memory, read only. Every field of the header is checked before
/// use: header length, JSON, types, shapes against byte counts, offsets against the file's size,
/// overlaps and gaps. Throws `Error` naming the file, the tensor, the value and the limit.
class COMMVQ_API SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return path_; }
  const std::map<std::string, TensorView>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  bool contains(const std::string& name) const { return tensors_.count(name) != 0; }
  /// Throws `Error` if the file holds no such tensor.
  const TensorView& at(const std::string& name) const;

 private:
  std::filesystem::path path_;
  std::shared_ptr<const void> mapping_;  // unmaps on destruction
  std::map<std::string, TensorView> tensors_;
  std::map<std::string, std::string> metadata_;
};

/// The weights of a Hugging Face model folder: `model.safetensors`, or the shards that
/// `model.safetensors.index.json` names. Shard names that leave the folder are refused, and a
/// tensor that the index places in a shard which lacks it is an error.
class COMMVQ_API Checkpoint {
 public:
  explicit Checkpoint(const std::filesystem::path& folder);

  bool contains(const std::string& name) const { return location_.count(name) != 0; }
  const TensorView& at(const std::string& name) const;
  std::vector<std::string> names() const;

 private:
  std::filesystem::path folder_;
  std::vector<SafetensorsFile> shards_;
  std::map<std::string, std::size_t> location_;
};

/// Collects tensors and writes them as one safetensors file.
class COMMVQ_API SafetensorsWriter {
 public:
  /// Copies the elements. Throws `Error` if the name is taken or the size does not match the shape.
  void add(const std::string& name, const std::vector<Index>& shape, std::span<const float> values);
  void add(const std::string& name, Dtype dtype, const std::vector<Index>& shape,
           std::span<const std::uint8_t> bytes);
  void set_metadata(const std::string& key, const std::string& value);

  /// Writes to a temporary file beside `path`, waits until it is on the disk and renames it, so that
  /// `path` never holds half a file. Throws `Error` with the system's reason.
  void write(const std::filesystem::path& path) const;
  /// The same through other system calls, for tests of their failures.
  void write(const std::filesystem::path& path, detail::FileLayer& files) const;

 private:
  struct Entry {
    Dtype dtype;
    std::vector<Index> shape;
    std::vector<std::uint8_t> bytes;
  };
  std::map<std::string, Entry> entries_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace commvq
