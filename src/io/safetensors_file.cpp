#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <limits>
#include <string_view>

#include "commvq/io/safetensors.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "strict_json.hpp"
#include "tensor_size.hpp"

namespace commvq {
namespace {

using detail::in_quotes;
using nlohmann::json;

constexpr std::uint64_t kLengthBytes = 8;               // the header's length, little-endian
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr int kMaxHeaderDepth = 3;                      // file, tensor, shape
constexpr std::size_t kMaxRank = 64;

struct Mapping {
  std::shared_ptr<const void> owner;
  std::span<const std::uint8_t> bytes;
};

Mapping map_file(const std::filesystem::path& path) {
  // O_NONBLOCK: a named pipe must not make us wait for its writer.
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  require(descriptor >= 0, path.string(), ": cannot be opened: ", std::strerror(errno));
  const std::shared_ptr<void> closer(nullptr, [descriptor](void*) { ::close(descriptor); });

  struct stat status {};
  require(::fstat(descriptor, &status) == 0, path.string(), ": ", std::strerror(errno));
  require(S_ISREG(status.st_mode), path.string(), ": not a regular file");
  const auto size = static_cast<std::size_t>(status.st_size);
  require(size > kLengthBytes, path.string(), ": ", size,
          " bytes are too few for a safetensors file");

  void* const start = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor, 0);
  require(start != MAP_FAILED, path.string(), ": cannot be mapped: ", std::strerror(errno));
  std::shared_ptr<const void> owner(
      start, [size](const void* p) { ::munmap(const_cast<void*>(p), size); });
  return {std::move(owner), {static_cast<const std::uint8_t*>(start), size}};
}

/// The header's text, once its length has been checked.
std::string_view header_text(std::span<const std::uint8_t> file, const std::string& where) {
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), kLengthBytes);
  require(length <= kMaxHeaderBytes, where, ": header of ", length, " bytes; at most ",
          kMaxHeaderBytes, " are allowed. Is it a safetensors file?");
  require(length <= file.size() - kLengthBytes, where, ": header of ", length,
          " bytes in a file of ", file.size(), "; the file is cut short");
  require(length > 0 && file[kLengthBytes] == '{', where, ": header does not begin with '{'");
  return {reinterpret_cast<const char*>(file.data()) + kLengthBytes,
          static_cast<std::size_t>(length)};
}

const json& member(const json& object, const char* key, const std::string& what) {
  const auto found = object.find(key);
  require(found != object.end(), what, ": ", key, " is missing");
  return *found;
}

Index to_index(const json& number, const char* field, const std::string& what) {
  require(number.is_number_unsigned(), what, ": ", field, " holds ", in_quotes(number.dump()),
          "; a whole number that is not negative is needed");
  const auto value = number.get<std::uint64_t>();
  require(value <= static_cast<std::uint64_t>(std::numeric_limits<Index>::max()), what, ": ", field,
          " holds ", value, "; the limit is ", std::numeric_limits<Index>::max());
  return static_cast<Index>(value);
}

Dtype to_dtype(const json& name, const std::string& what) {
  constexpr std::array kAll = {Dtype::kBool, Dtype::kU8,  Dtype::kI8,  Dtype::kU16, Dtype::kI16,
                               Dtype::kU32,  Dtype::kI32, Dtype::kU64, Dtype::kI64, Dtype::kF16,
                               Dtype::kBf16, Dtype::kF32, Dtype::kF64};
  require(name.is_string(), what, ": dtype is not a string");
  const auto& text = name.get_ref<const std::string&>();
  const auto found = std::ranges::find_if(kAll, [&](Dtype d) { return text == name_of(d); });
  require(found != kAll.end(), what, ": dtype ", in_quotes(text), " is not supported");
  return *found;
}

/// Indices of `array`, at most `max_size` of them.
std::vector<Index> to_indices(const json& array, std::size_t max_size, const char* field,
                              const std::string& what) {
  require(array.is_array(), what, ": ", field, " is not an array");
  require(array.size() <= max_size, what, ": ", field, " has ", array.size(),
          " entries; the limit is ", max_size);
  std::vector<Index> indices;
  for (const json& entry : array) indices.push_back(to_index(entry, field, what));
  return indices;
}

TensorView to_tensor(const std::string& name, const json& entry,
                     std::span<const std::uint8_t> buffer, const std::string& where) {
  const std::string what = where + ": tensor " + in_quotes(name);
  require(entry.is_object(), what, ": not described by an object");
  require(entry.size() == 3, what, ": described by ", entry.size(),
          " fields; dtype, shape and data_offsets are needed");
  TensorView tensor;
  tensor.name = name;
  tensor.dtype = to_dtype(member(entry, "dtype", what), what);
  tensor.shape = to_indices(member(entry, "shape", what), kMaxRank, "shape", what);
  const auto range = to_indices(member(entry, "data_offsets", what), 2, "data_offsets", what);
  require(range.size() == 2, what, ": data_offsets has ", range.size(), " entries; 2 are needed");

  const auto [begin, end] = std::pair(range[0], range[1]);
  require(begin <= end && end <= static_cast<Index>(buffer.size()), what, ": data_offsets [", begin,
          ", ", end, "] do not lie within the file's ", buffer.size(), " bytes of data");
  const Index needed = detail::checked_bytes(tensor.dtype, tensor.shape, what);
  require(needed == end - begin, what, ": shape ", detail::to_text(tensor.shape), " of ",
          name_of(tensor.dtype), " needs ", needed, " bytes, but data_offsets [", begin, ", ", end,
          "] hold ", end - begin);
  tensor.data = buffer.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(needed));
  return tensor;
}

std::map<std::string, std::string> to_metadata(const json& object, const std::string& where) {
  require(object.is_object(), where, ": __metadata__ is not an object");
  std::map<std::string, std::string> metadata;
  for (const auto& [key, value] : object.items()) {
    require(value.is_string(), where, ": __metadata__ ", in_quotes(key), " is not a string");
    metadata[key] = value.get<std::string>();
  }
  return metadata;
}

/// Tensors must cover the data exactly: a byte of two tensors or of none marks a broken file.
void require_no_gaps(const std::map<std::string, TensorView>& tensors,
                     std::span<const std::uint8_t> buffer, const std::string& where) {
  std::vector<const TensorView*> in_file_order;
  in_file_order.reserve(tensors.size());
  for (const auto& [name, tensor] : tensors) in_file_order.push_back(&tensor);
  std::ranges::sort(in_file_order, {}, [](const TensorView* tensor) {
    return std::pair(tensor->data.data(), tensor->data.size());
  });
  const std::uint8_t* expected = buffer.data();
  for (const TensorView* tensor : in_file_order) {
    const std::uint8_t* const begin = tensor->data.data();
    require(begin == expected, where, ": tensor ", in_quotes(tensor->name), " begins at byte ",
            begin - buffer.data(), " of the data, where the one before it ends at ",
            expected - buffer.data(), "; gaps and overlaps are not allowed");
    expected = begin + tensor->data.size();
  }
  const Index covered = expected - buffer.data();
  require(covered == static_cast<Index>(buffer.size()), where, ": ", buffer.size(),
          " bytes of data, of which the tensors cover ", covered);
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : path_(path) {
  const std::string where = path.string();
  const Mapping mapping = map_file(path);
  mapping_ = mapping.owner;
  const std::string_view text = header_text(mapping.bytes, where);
  const auto buffer = mapping.bytes.subspan(kLengthBytes + text.size());
  const json header = detail::parse_strict_json(text, kMaxHeaderDepth, where + ": header");
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__")
      metadata_ = to_metadata(entry, where);
    else
      tensors_.emplace(name, to_tensor(name, entry, buffer, where));
  }
  require_no_gaps(tensors_, buffer, where);
}

const TensorView& SafetensorsFile::at(const std::string& name) const {
  const auto found = tensors_.find(name);
  require(found != tensors_.end(), path_.string(), ": holds no tensor ", in_quotes(name));
  return found->second;
}

}  // namespace commvq
