#include "commvq/io/safetensors.hpp"

#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <numeric>
#include <random>

#include "commvq/core/float16.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "reference/faulty_files.hpp"

namespace commvq {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

/// A folder of the test's own, removed with its contents.
class SafetensorsTest : public ::testing::Test {
 protected:
  SafetensorsTest()
      : folder_(fs::temp_directory_path() / ("commvq_io_" + std::to_string(getpid()))) {
    fs::remove_all(folder_);
    fs::create_directory(folder_);
  }
  ~SafetensorsTest() override { fs::remove_all(folder_); }

  fs::path file(const std::string& name = "file.safetensors") const { return folder_ / name; }

  fs::path write_text(const std::string& name, const std::string& bytes) const {
    std::ofstream(file(name), std::ios::binary) << bytes;
    return file(name);
  }

  /// A file of this header and `data_bytes` zeros.
  fs::path write_raw(const std::string& header, std::size_t data_bytes) const {
    std::uint64_t length = header.size();
    std::string bytes(8, '\0');
    std::memcpy(bytes.data(), &length, 8);
    return write_text("file.safetensors", bytes + header + std::string(data_bytes, '\0'));
  }

  void write_tensors(const std::string& name, const std::vector<std::string>& tensors) const {
    SafetensorsWriter writer;
    float value = 0;
    for (const std::string& tensor : tensors) {
      value += 1;
      writer.add(tensor, {1}, std::span<const float>(&value, 1));
    }
    writer.write(file(name));
  }

  fs::path folder_;
};

std::string read_bytes(const fs::path& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "(no error)";
}

std::vector<std::uint8_t> counting_bytes(Index count) {
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(count));
  std::iota(bytes.begin(), bytes.end(), std::uint8_t{1});
  return bytes;
}

constexpr Dtype kAllDtypes[] = {Dtype::kBool, Dtype::kU8,  Dtype::kI8,  Dtype::kU16, Dtype::kI16,
                                Dtype::kU32,  Dtype::kI32, Dtype::kU64, Dtype::kI64, Dtype::kF16,
                                Dtype::kBf16, Dtype::kF32, Dtype::kF64};

TEST_F(SafetensorsTest, RoundTripsEveryDtypeShapeAndMetadata) {
  SafetensorsWriter writer;
  for (const Dtype dtype : kAllDtypes)
    writer.add(name_of(dtype), dtype, {3, 1, 5}, counting_bytes(15 * size_of(dtype)));
  writer.add("scalar", Dtype::kI16, {}, counting_bytes(2));
  writer.add("empty", Dtype::kF32, {4, 0}, {});
  writer.set_metadata("quote \" and \xc3\xa9", "line\nbreak");
  writer.write(file());

  const SafetensorsFile read(file());
  EXPECT_EQ(read.tensors().size(), std::size(kAllDtypes) + 2);
  for (const Dtype dtype : kAllDtypes) {
    const TensorView& tensor = read.at(name_of(dtype));
    EXPECT_EQ(tensor.dtype, dtype);
    EXPECT_THAT(tensor.shape, ElementsAre(3, 1, 5));
    EXPECT_EQ(tensor.num_elements(), 15);
    const auto expected = counting_bytes(15 * size_of(dtype));
    EXPECT_TRUE(std::ranges::equal(tensor.data, expected)) << name_of(dtype);
  }
  EXPECT_TRUE(read.at("scalar").shape.empty());
  EXPECT_EQ(read.at("scalar").num_elements(), 1);
  EXPECT_THAT(read.at("empty").shape, ElementsAre(4, 0));
  EXPECT_TRUE(read.at("empty").to_floats().empty());
  EXPECT_THAT(read.metadata(), ElementsAre(std::pair("quote \" and \xc3\xa9", "line\nbreak")));
}

TEST_F(SafetensorsTest, WritesTensorsAligned) {
  SafetensorsWriter writer;
  writer.add("a", Dtype::kU8, {3}, counting_bytes(3));
  writer.add("b", Dtype::kF64, {1}, counting_bytes(8));
  writer.add("c", Dtype::kF16, {1}, counting_bytes(2));
  writer.write(file());
  const SafetensorsFile read(file());
  for (const auto& [name, tensor] : read.tensors())
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(tensor.data.data()) % size_of(tensor.dtype), 0u);
}

TEST_F(SafetensorsTest, ConvertsFloatsOfEveryWidth) {
  const std::vector<float> values = {0.0f, -1.5f, 0.15625f, 65504.0f};
  std::vector<std::uint16_t> half, brain;
  const std::vector<double> wide(values.begin(), values.end());
  for (const float value : values) {
    half.push_back(to_fp16(value));
    brain.push_back(to_bf16(value));
  }
  const auto as_bytes = [](const auto& elements) {
    return std::span(reinterpret_cast<const std::uint8_t*>(elements.data()),
                     elements.size() * sizeof(elements[0]));
  };
  SafetensorsWriter writer;
  writer.add("f16", Dtype::kF16, {4}, as_bytes(half));
  writer.add("bf16", Dtype::kBf16, {4}, as_bytes(brain));
  writer.add("f32", {2, 2}, values);
  writer.add("f64", Dtype::kF64, {4}, as_bytes(wide));
  writer.add("i32", Dtype::kI32, {1}, counting_bytes(4));
  writer.write(file());

  const SafetensorsFile read(file());
  EXPECT_EQ(read.at("f16").to_floats(), values);
  EXPECT_THAT(read.at("bf16").to_floats(), ElementsAre(0.0f, -1.5f, 0.15625f, 65536.0f));
  EXPECT_EQ(read.at("f32").to_floats({2, 2}), values);
  EXPECT_EQ(read.at("f64").to_floats(), values);
  EXPECT_THAT(error_of([&] { read.at("i32").to_floats(); }), HasSubstr("\"i32\" holds I32"));
  EXPECT_THAT(error_of([&] { read.at("f32").to_floats({4}); }), HasSubstr("[2, 2]; [4] is needed"));
  EXPECT_THAT(error_of([&] { read.at("f33"); }), HasSubstr("no tensor \"f33\""));
}

TEST_F(SafetensorsTest, ReadsUnalignedTensors) {
  const std::string header = R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                             R"("b":{"dtype":"F64","shape":[2],"data_offsets":[1,17]}})";
  const fs::path path = write_raw(header, 0);
  const double values[] = {1.25, -3.0};
  std::string bytes = read_bytes(path) + '\7';
  bytes.append(reinterpret_cast<const char*>(values), sizeof(values));
  write_text("file.safetensors", bytes);
  EXPECT_THAT(SafetensorsFile(path).at("b").to_floats(), ElementsAre(1.25f, -3.0f));
}

TEST_F(SafetensorsTest, AcceptsPaddingAfterTheHeaderAndAnEmptyFile) {
  EXPECT_TRUE(SafetensorsFile(write_raw("{}      ", 0)).tensors().empty());
  SafetensorsWriter().write(file());
  EXPECT_TRUE(SafetensorsFile(file()).tensors().empty());
}

TEST_F(SafetensorsTest, TensorsOutliveCopiesOfTheFile) {
  write_tensors("file.safetensors", {"a"});
  auto first = std::make_unique<SafetensorsFile>(file());
  const SafetensorsFile second = *first;
  first.reset();
  EXPECT_THAT(second.at("a").to_floats(), ElementsAre(1.0f));
}

struct BadHeader {
  std::string header;
  std::size_t data_bytes;
  std::string message;
};

TEST_F(SafetensorsTest, RefusesHeadersThatLie) {
  const auto one = [](const std::string& dtype, const std::string& shape,
                      const std::string& range) {
    return R"({"a":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + range +
           "}}";
  };
  const std::string four = one(R"("F32")", "[1]", "[0,4]");
  const std::vector<BadHeader> cases = {
      {"[]", 0, "does not begin with '{'"},
      {" {}", 0, "does not begin with '{'"},
      {"{", 0, "not valid JSON"},
      {"{}x", 0, "not valid JSON"},
      {std::string("{}\0", 3), 0, "not valid JSON"},
      {"{\"\xff\":1}", 0, "not valid JSON"},
      {R"({"a":1e999})", 0, "JSON cannot be read"},
      {R"({"a":3})", 0, "not described by an object"},
      {R"({"a":{"dtype":"F32","shape":[0]}})", 0, "described by 2 fields"},
      {R"({"a":{"dtype":"F32","shape":[0],"offsets":[0,0]}})", 0, "data_offsets is missing"},
      {one("3", "[1]", "[0,4]"), 4, "dtype is not a string"},
      {one(R"("F31")", "[1]", "[0,4]"), 4, "dtype \"F31\" is not supported"},
      {one(R"("F32")", "1", "[0,4]"), 4, "shape is not an array"},
      {one(R"("F32")", "[1.0]", "[0,4]"), 4, "shape holds \"1.0\""},
      {one(R"("F32")", "[-1]", "[0,4]"), 4, "shape holds \"-1\""},
      {one(R"("F32")", "[\"1\"]", "[0,4]"), 4, "a whole number"},
      {one(R"("F32")", "[18446744073709551615]", "[0,4]"), 4, "the limit is 9223372036854775807"},
      {one(R"("F32")", "[4294967296,1073741824]", "[0,0]"), 0, "needs more than"},
      {one(R"("F32")", "[9223372036854775807]", "[0,4]"), 4, "needs more than"},
      {one(R"("F32")", "[2]", "[0,4]"), 4, "needs 8 bytes"},
      {one(R"("F32")", "[1]", "[0]"), 4, "data_offsets has 1 entries"},
      {one(R"("F32")", "[1]", "[0,4,4]"), 4, "data_offsets has 3 entries"},
      {one(R"("F32")", "[1]", "[4,0]"), 4, "do not lie within"},
      {one(R"("F32")", "[1]", "[4,8]"), 4, "do not lie within"},
      {one(R"("F32")", "[1]", "[9223372036854775804,9223372036854775807]"), 4, "do not lie within"},
      {four, 5, "of which the tensors cover 4"},
      {"{}", 1, "of which the tensors cover 0"},
      {one(R"("F32")", "[1]", "[4,8]"), 8, "gaps and overlaps"},
      {four.substr(0, four.size() - 1) +
           R"(,"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}})",
       6, "gaps and overlaps"},
      {four.substr(0, four.size() - 1) +
           R"(,"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
       4, "gaps and overlaps"},
      {four.substr(0, four.size() - 1) +
           R"(,"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
       8, "key \"a\" is given twice"},
      {R"({"a":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}})", 0, "given twice"},
      {one(R"("F32")", "[[1]]", "[0,4]"), 4, "nested deeper"},
      {R"({"__metadata__":[]})", 0, "__metadata__ is not an object"},
      {R"({"__metadata__":{"a":1}})", 0, "\"a\" is not a string"},
      {"{\"a\":" + std::string(1000000, '['), 0, "nested deeper"},
  };
  for (const BadHeader& bad : cases) {
    const fs::path path = write_raw(bad.header, bad.data_bytes);
    const std::string message = error_of([&] { SafetensorsFile{path}; });
    EXPECT_THAT(message, HasSubstr(bad.message)) << bad.header.substr(0, 200);
    EXPECT_THAT(message, HasSubstr(path.string()));
  }
}

TEST_F(SafetensorsTest, RefusesHeaderLengthsBeyondTheFileOrTheLimit) {
  for (const std::uint64_t length :
       {std::uint64_t{0}, std::uint64_t{3}, std::uint64_t{100'000'000}, std::uint64_t{100'000'001},
        std::uint64_t{1} << 63, ~std::uint64_t{0}, ~std::uint64_t{0} - 7}) {
    std::string bytes = read_bytes(write_raw("{}", 0));
    std::memcpy(bytes.data(), &length, 8);
    EXPECT_THROW(SafetensorsFile{write_text("f", bytes)}, Error) << length;
  }
}

// Sparse: the file takes a few blocks of the disk.
TEST_F(SafetensorsTest, ReadsFilesBeyondFourGigabytes) {
  constexpr std::uint64_t kLarge = 5'000'000'000;
  const std::string header =
      R"({"large":{"dtype":"U8","shape":[5000000000],"data_offsets":[0,5000000000]},)"
      R"("last":{"dtype":"F32","shape":[2],"data_offsets":[5000000000,5000000008]}})";
  const fs::path path = write_raw(header, 0);
  fs::resize_file(path, 8 + header.size() + kLarge + 8);
  const float values[] = {1.5f, -2.5f};
  std::fstream stream(path, std::ios::binary | std::ios::in | std::ios::out);
  stream.seekp(-8, std::ios::end).write(reinterpret_cast<const char*>(values), 8);
  stream.close();
  ASSERT_TRUE(stream.good());

  const SafetensorsFile file(path);
  EXPECT_EQ(file.at("large").data.size(), kLarge);
  EXPECT_EQ(file.at("large").num_elements(), static_cast<Index>(kLarge));
  EXPECT_EQ(file.at("large").data[kLarge - 1], 0);
  EXPECT_THAT(file.at("last").to_floats(), ElementsAre(1.5f, -2.5f));
  fs::resize_file(path, 8 + header.size() + kLarge + 7);
  EXPECT_THAT(error_of([&] { SafetensorsFile{path}; }), HasSubstr("do not lie within"));
}

TEST_F(SafetensorsTest, RefusesWhatIsNoSafetensorsFile) {
  EXPECT_THAT(error_of([&] { SafetensorsFile{file("missing")}; }), HasSubstr("cannot be opened"));
  EXPECT_THAT(error_of([&] { SafetensorsFile{folder_}; }), HasSubstr("not a regular file"));
  EXPECT_THAT(error_of([&] { SafetensorsFile{write_text("f", "")}; }), HasSubstr("too few"));
  EXPECT_THAT(error_of([&] { SafetensorsFile{write_text("f", "GGUF and then some text")}; }),
              HasSubstr("Is it a safetensors file?"));
}

/// Reads every tensor; a lie about memory would be seen here by a sanitizer, or as a crash.
void read_all(const SafetensorsFile& file) {
  for (const auto& [name, tensor] : file.tensors()) {
    EXPECT_EQ(tensor.num_elements() * size_of(tensor.dtype),
              static_cast<Index>(tensor.data.size()));
    volatile std::uint8_t last = 0;
    for (const std::uint8_t byte : tensor.data) last = byte;
    (void)last;
  }
}

std::string small_file(const fs::path& path) {
  SafetensorsWriter writer;
  const float values[] = {1, 2, 3, 4, 5, 6};
  writer.add("matrix", {2, 3}, values);
  writer.add("bytes", Dtype::kU8, {5}, counting_bytes(5));
  writer.set_metadata("format", "pt");
  writer.write(path);
  return read_bytes(path);
}

TEST_F(SafetensorsTest, EveryTruncationIsAnError) {
  const std::string whole = small_file(file());
  for (std::size_t size = 0; size < whole.size(); ++size)
    EXPECT_THROW(SafetensorsFile{write_text("cut", whole.substr(0, size))}, Error) << size;
}

TEST_F(SafetensorsTest, MutatedFilesAreRefusedOrRead) {
  const std::string whole = small_file(file());
  const std::size_t header_end = whole.size() - 29;  // 6 floats and 5 bytes
  std::mt19937_64 random(7);
  int refused = 0, accepted = 0;
  for (int trial = 0; trial < 6000; ++trial) {
    std::string bytes = whole;
    for (std::uint64_t change = 0; change <= random() % 3; ++change)
      bytes[random() % header_end] =
          random() % 2 == 0 ? static_cast<char>('0' + random() % 10) : static_cast<char>(random());
    try {
      read_all(SafetensorsFile(write_text("mutated", bytes)));
      ++accepted;
    } catch (const Error&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 3000);
  EXPECT_GT(accepted, 50);  // letters of a name may change
}

TEST_F(SafetensorsTest, WriterRefusesWhatDoesNotFit) {
  SafetensorsWriter writer;
  const std::vector<float> values(6);
  writer.add("a", {6}, values);
  EXPECT_THAT(error_of([&] { writer.add("a", {6}, values); }), HasSubstr("\"a\": added twice"));
  EXPECT_THAT(error_of([&] { writer.add("b", {7}, values); }), HasSubstr("needs 28 bytes, not 24"));
  EXPECT_THAT(error_of([&] { writer.add("b", {-6}, values); }), HasSubstr("negative"));
  const Index huge = std::numeric_limits<Index>::max();
  EXPECT_THAT(error_of([&] { writer.add("b", {huge, huge}, values); }), HasSubstr("more than"));
  EXPECT_THAT(error_of([&] { writer.add("__metadata__", {6}, values); }), HasSubstr("reserves"));
  EXPECT_THAT(error_of([&] { writer.write(folder_ / "none" / "f"); }),
              HasSubstr("No such file or directory"));
  writer.add("\xff", {6}, values);
  EXPECT_THAT(error_of([&] { writer.write(file()); }), HasSubstr("UTF-8"));
  EXPECT_FALSE(fs::exists(file()));
}

TEST_F(SafetensorsTest, WritingReplacesTheFileAndLeavesNothingBehind) {
  write_tensors("file.safetensors", {"old"});
  const SafetensorsFile old(file());
  write_tensors("file.safetensors", {"new"});
  EXPECT_TRUE(SafetensorsFile(file()).contains("new"));
  EXPECT_THAT(old.at("old").to_floats(), ElementsAre(1.0f));  // still mapped

  fs::create_directory(folder_ / "taken");
  EXPECT_THROW(write_tensors("taken", {"a"}), Error);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()), 2);
}

TEST_F(SafetensorsTest, InterruptedWritingLeavesTheOldFileWhole) {
  write_tensors("file.safetensors", {"old"});
  const std::string old_bytes = read_bytes(file());
  SafetensorsWriter writer;
  const std::vector<float> values(3);
  writer.add("new", {3}, values);
  writer.write(file("new.safetensors"));
  const auto size = static_cast<std::size_t>(fs::file_size(file("new.safetensors")));
  for (const bool dies : {false, true})
    for (std::size_t bytes = 0; bytes < size; ++bytes) {
      testing_support::FaultyFiles files;
      files.bytes_until_fault = bytes;
      files.error = ENOSPC;
      files.dies = dies;
      EXPECT_THAT(error_of([&] { writer.write(file(), files); }), HasSubstr("No space left"));
      ASSERT_EQ(read_bytes(file()), old_bytes) << bytes;
      if (!dies) {
        ASSERT_EQ(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()), 2);
      }
    }
  for (const char* call : {"create", "sync", "close", "rename"}) {
    testing_support::FaultyFiles files;
    files.failing_call = call;
    EXPECT_THROW(writer.write(file(), files), Error) << call;
    EXPECT_EQ(read_bytes(file()), old_bytes) << call;
  }
  testing_support::FaultyFiles files;
  files.longest_transfer = 3;
  files.interrupts = true;
  writer.write(file(), files);
  EXPECT_EQ(read_bytes(file()), read_bytes(file("new.safetensors")));
}

TEST_F(SafetensorsTest, CheckpointOfOneFile) {
  write_tensors("model.safetensors", {"b", "a"});
  const Checkpoint checkpoint(folder_);
  EXPECT_THAT(checkpoint.names(), ElementsAre("a", "b"));
  EXPECT_THAT(checkpoint.at("a").to_floats(), ElementsAre(2.0f));
  EXPECT_FALSE(checkpoint.contains("c"));
  EXPECT_THAT(error_of([&] { checkpoint.at("c"); }), HasSubstr("no tensor \"c\""));
}

TEST_F(SafetensorsTest, CheckpointOfShards) {
  write_tensors("one.safetensors", {"a", "b"});
  write_tensors("two.safetensors", {"c", "b"});  // the index decides which b counts
  write_text("model.safetensors.index.json",
             R"({"metadata":{"total_size":16},"weight_map":)"
             R"({"a":"one.safetensors","b":"two.safetensors","c":"two.safetensors"}})");
  const Checkpoint checkpoint(folder_);
  EXPECT_THAT(checkpoint.names(), ElementsAre("a", "b", "c"));
  EXPECT_THAT(checkpoint.at("a").to_floats(), ElementsAre(1.0f));
  EXPECT_THAT(checkpoint.at("b").to_floats(), ElementsAre(2.0f));
  EXPECT_THAT(checkpoint.at("c").to_floats(), ElementsAre(1.0f));
}

TEST_F(SafetensorsTest, RefusesBadIndexes) {
  const auto error_for = [&](const std::string& index) {
    write_text("model.safetensors.index.json", index);
    return error_of([&] { Checkpoint{folder_}; });
  };
  const auto error_for_shard = [&](const std::string& shard) {
    return error_for(R"({"weight_map":{"a":)" + shard + "}}");
  };
  EXPECT_THAT(error_of([&] { Checkpoint{folder_}; }), HasSubstr("holds neither"));
  write_tensors("one.safetensors", {"a"});
  EXPECT_EQ(error_for_shard(R"("one.safetensors")"), "(no error)");
  for (const char* escape :
       {R"("../one.safetensors")", R"("/etc/passwd")", R"("x/one.safetensors")", R"("..")",
        R"(".")", R"("")", R"("one\u0000.safetensors")", R"("one\u007f.safetensors")",
        R"("\u0001one.safetensors")", R"("..\\one.safetensors")"})
    EXPECT_THAT(error_for_shard(escape), HasSubstr("not the plain name")) << escape;
  const std::string long_name(3000, 'a');
  EXPECT_THAT(error_for_shard('"' + long_name + '"'), HasSubstr("not the plain name"));
  EXPECT_LT(error_for_shard('"' + long_name + '"').size(), 500u);
  EXPECT_THAT(error_for_shard("3"), HasSubstr("is not a string"));
  EXPECT_THAT(error_for_shard(R"("two.safetensors")"), HasSubstr("cannot be opened"));
  EXPECT_THAT(error_for(R"({"weight_map":{"b":"one.safetensors"}})"), HasSubstr("which lacks it"));
  EXPECT_THAT(error_for(R"({"weight_map":{"a":"one.safetensors","a":"one.safetensors"}})"),
              HasSubstr("given twice"));
  EXPECT_THAT(error_for(R"({"weight_map":{}})"), HasSubstr("names no tensor"));
  EXPECT_THAT(error_for(R"({"weights":{}})"), HasSubstr("weight_map"));
  EXPECT_THAT(error_for("[]"), HasSubstr("weight_map"));
  EXPECT_THAT(error_for(""), HasSubstr("not valid JSON"));
  EXPECT_THAT(error_for(std::string(100000, '[')), HasSubstr("nested deeper"));
}

TEST(ExampleCheckpoint, HoldsTheTensorsOfItsModel) {
  const Checkpoint checkpoint(fs::path(COMMVQ_EXAMPLE_DATA) / "lm-7m");
  const TensorView& embedding = checkpoint.at("model.embed_tokens.weight");
  EXPECT_EQ(embedding.dtype, Dtype::kBf16);
  const std::vector<float> floats = embedding.to_floats({8192, 256});
  EXPECT_TRUE(std::ranges::all_of(floats, [](float value) { return std::isfinite(value); }));
  const std::vector<float> gain = checkpoint.at("model.norm.weight").to_floats({256});
  EXPECT_TRUE(std::ranges::all_of(gain, [](float value) { return value > 0.0f; }));
  for (int layer = 0; layer < 6; ++layer)
    EXPECT_THAT(
        checkpoint.at("model.layers." + std::to_string(layer) + ".self_attn.k_proj.weight").shape,
        ElementsAre(2 * 128, 256));
}

}  // namespace
}  // namespace commvq
