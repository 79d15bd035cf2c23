// A caller in C that passes any sizes, options and numbers: each call returns a known status, a
// failing one leaves a readable reason, and attention gives finite numbers.
#include <cmath>
#include <vector>

#include "commvq/c_api.h"

#include "fuzz/byte_reader.hpp"
#include "fuzz/example_codecs.hpp"
#include "fuzz/input_file.hpp"

namespace {

using namespace commvq;

constexpr Index kFloats = 1 << 12;  // behind every matrix that is passed
constexpr int kMostCalls = 40;
constexpr Index kMostTokens = 1024;            // in a cache, for speed
constexpr std::size_t kMemoryMultiple = 4096;  // a byte may append 40 tokens to four layers
constexpr Index kChannels = 8;

const commvq_codecs* example() {
  static const commvq_codecs* const codecs = [] {
    const fuzz::InputFile file("codecs.safetensors");
    save_codecs(file.path(), fuzz::example_codecs());
    commvq_codecs* loaded = nullptr;
    fuzz::demand(commvq_codecs_load(file.path().c_str(), &loaded) == COMMVQ_OK,
                 "the example does not load");
    return loaded;
  }();
  return codecs;
}

void check(commvq_status status) {
  fuzz::demand(status >= COMMVQ_OK && status < COMMVQ_INTERNAL_ERROR, commvq_last_error());
  if (status != COMMVQ_OK) fuzz::demand_readable(commvq_last_error());
}

/// Numbers of every kind, repeated.
std::vector<float> numbers(fuzz::ByteReader& input) {
  float kinds[4];
  for (float& kind : kinds) {
    const auto byte = input.take<std::uint8_t>();
    kind = byte < 200 ? static_cast<float>(byte) - 100.0f : input.take<float>();
  }
  std::vector<float> floats(kFloats);
  for (std::size_t i = 0; i < floats.size(); ++i) floats[i] = kinds[(i * 7 + i / 16) % 4];
  return floats;
}

/// Any shape; null data unless its elements are there.
template <class Matrix, class Float>
Matrix matrix_of(fuzz::ByteReader& input, Float* data) {
  Matrix matrix{data, input.size(), input.size(), input.size()};
  const auto usual = input.take<std::uint8_t>();
  if (usual < 220) matrix.cols = usual < 200 ? kChannels : 2 * kChannels;
  if (usual < 210) matrix.row_stride = matrix.cols;
  Index last = 0, end = 0;
  const bool fits = matrix.rows >= 0 && matrix.cols >= 0 && matrix.row_stride >= 0 &&
                    !__builtin_mul_overflow(matrix.rows, matrix.row_stride, &last) &&
                    !__builtin_add_overflow(last, matrix.cols, &end) && end <= kFloats;
  if (!fits) matrix.data = nullptr;
  return matrix;
}

/// Options of either kind: defaults, with some fields any.
commvq_cache_options cache_options(fuzz::ByteReader& input) {
  commvq_cache_options options;
  check(commvq_cache_options_init(&options, sizeof options));
  const auto changes = input.take<std::uint8_t>();
  options.window = (changes & 1) != 0 ? input.size() : 4;
  options.page_size = (changes & 2) != 0 ? input.size() : 8;
  if ((changes & 4) != 0) options.sinks = input.size();
  if ((changes & 8) != 0) options.exact_type = input.take<std::int8_t>();
  if ((changes & 16) != 0) options.exact_keys = input.take<std::int8_t>();
  if ((changes & 32) != 0) options.exact_values = input.take<std::int8_t>();
  if ((changes & 64) != 0) options.struct_size = input.take<std::uint16_t>() % sizeof options;
  return options;
}

commvq_attention_options attention_options(fuzz::ByteReader& input) {
  commvq_attention_options options;
  check(commvq_attention_options_init(&options, sizeof options));
  const auto changes = input.take<std::uint8_t>();
  if ((changes & 1) != 0) options.sliding_window = input.size();
  if ((changes & 2) != 0) options.scale = input.take<float>();
  if ((changes & 4) != 0) options.soft_cap = input.take<float>();
  if ((changes & 8) != 0) options.causal = input.take<std::int8_t>();
  if ((changes & 16) != 0) options.struct_size = input.take<std::uint16_t>() % sizeof options;
  return options;
}

void append(commvq_cache* cache, fuzz::ByteReader& input) {
  const std::vector<float> keys = numbers(input), values = numbers(input);
  const auto key_rows = matrix_of<commvq_const_matrix>(input, keys.data());
  auto value_rows = matrix_of<commvq_const_matrix>(input, values.data());
  if (input.take<std::uint8_t>() < 200)
    value_rows = {values.data(), key_rows.rows, key_rows.cols, key_rows.row_stride};
  if (key_rows.data == nullptr) value_rows.data = nullptr;
  std::int64_t length = 0;
  check(commvq_cache_length(cache, &length));
  if (length > kMostTokens) return;
  const int only = input.take<std::int8_t>();
  for (int layer = 0; layer < 4; ++layer)
    check(commvq_cache_append(cache, only < 100 ? layer : only, &key_rows, &value_rows));
}

void attend(const commvq_cache* cache, fuzz::ByteReader& input) {
  const std::vector<float> queries = numbers(input);
  std::vector<float> output(kFloats), lse(kFloats);
  const auto query_rows = matrix_of<commvq_const_matrix>(input, queries.data());
  auto output_rows = matrix_of<commvq_matrix>(input, output.data());
  if (input.take<std::uint8_t>() < 200)
    output_rows = {output.data(), query_rows.rows, query_rows.cols, query_rows.cols};
  if (query_rows.data == nullptr) output_rows.data = nullptr;
  const commvq_attention_options options = attention_options(input);
  const commvq_status status = commvq_cache_attend(cache, input.take<std::uint8_t>() % 5,
                                                   &query_rows, &options, &output_rows, lse.data());
  check(status);
  if (status != COMMVQ_OK) return;
  for (Index row = 0; row < output_rows.rows; ++row)
    for (Index col = 0; col < output_rows.cols; ++col)
      fuzz::demand(std::isfinite(output_rows.data[row * output_rows.row_stride + col]),
                   "attention that is not finite");
}

/// Calls on one cache and its last fork.
void run(fuzz::ByteReader& input) {
  const commvq_cache_options options = cache_options(input);
  commvq_cache *cache = nullptr, *fork = nullptr;
  check(commvq_cache_create(example(), &options, &cache));
  if (cache == nullptr) return;
  for (int call = 0; call < kMostCalls && !input.empty(); ++call) {
    std::int64_t number = 0;
    double bytes = 0;
    switch (input.take<std::uint8_t>() % 8) {
      case 0:
      case 1:
        append(cache, input);
        break;
      case 2:
      case 3:
        attend(cache, input);
        break;
      case 4:
        check(commvq_cache_truncate(cache, input.size()));
        break;
      case 5:
        commvq_cache_destroy(std::exchange(fork, nullptr));
        check(commvq_cache_fork(cache, &fork));
        break;
      case 6:
        if (fork != nullptr) std::swap(cache, fork);
        break;
      default:
        check(commvq_cache_allocated_bytes(cache, &number));
        check(commvq_cache_bytes_per_token(cache, &bytes));
        if (input.take<std::uint8_t>() < 32) check(commvq_cache_clear(cache));
    }
  }
  commvq_cache_destroy(cache);
  commvq_cache_destroy(fork);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  example();
  fuzz::ByteReader input({data, size});
  fuzz::accepts(size, kMemoryMultiple, [&] { run(input); });
  return 0;
}
