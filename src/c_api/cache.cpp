#include <limits>

#include "commvq/attention/attention.hpp"

#include "c_api/guard.hpp"
#include "c_api/handles.hpp"
#include "c_api/structs.hpp"

using namespace commvq;
using namespace commvq::c_api;

namespace {

commvq_cache_options default_cache_options() {
  const CacheConfig config;
  commvq_cache_options options{};
  options.struct_size = sizeof options;
  options.window = config.window;
  options.sinks = config.sinks;
  options.page_size = config.page_size;
  options.exact_type = static_cast<std::int32_t>(config.exact_type);
  return options;
}

static_assert(static_cast<int>(FloatType::kBf16) == COMMVQ_BF16);
static_assert(static_cast<int>(FloatType::kFp16) == COMMVQ_FP16);
static_assert(static_cast<int>(FloatType::kFp32) == COMMVQ_FP32);

commvq_attention_options default_attention_options() {
  commvq_attention_options options{};
  options.struct_size = sizeof options;
  options.causal = 1;
  return options;
}

void require_flag(std::int32_t value, const char* name) {
  require(value == 0 || value == 1, name, " is ", value, "; it must be 0 or 1");
}

void require_reserved(std::int32_t value) {
  require(value == 0, "reserved is ", value, "; it must be 0");
}

Cache make_cache(const ModelCodecs& codecs, const commvq_cache_options& options) {
  require(options.exact_type >= COMMVQ_BF16 && options.exact_type <= COMMVQ_FP32, "exact_type is ",
          options.exact_type, "; it must be 0 (BF16), 1 (FP16) or 2 (FP32)");
  require_flag(options.exact_keys, "exact_keys");
  require_flag(options.exact_values, "exact_values");
  require_reserved(options.reserved);
  CacheConfig config;
  config.rope = codecs.rope;
  config.num_kv_heads = codecs.num_kv_heads;
  config.window = options.window;
  config.sinks = options.sinks;
  config.exact_type = static_cast<FloatType>(options.exact_type);
  config.page_size = options.page_size;
  std::vector<LayerCodec> layers = codecs.layers;
  for (LayerCodec& layer : layers) {
    if (options.exact_keys != 0) layer.keys = nullptr;
    if (options.exact_values != 0) layer.values = nullptr;
  }
  return Cache(config, std::move(layers));
}

/// `T` is float or const float.
template <class T, class Matrix>
MatrixView<T> view_of(const Matrix* matrix, const char* name) {
  const Matrix& m = deref(matrix, name);
  require(m.rows >= 0, name, " has ", m.rows, " rows");
  require(m.cols >= 1, name, " has ", m.cols, " columns; it must have at least 1");
  require(m.row_stride >= m.cols, name, " has a row_stride of ", m.row_stride,
          " floats; it must be at least the ", m.cols, " columns");
  require(m.rows == 0 || m.row_stride <= std::numeric_limits<Index>::max() / 8 / m.rows, name,
          " has ", m.rows, " rows, ", m.row_stride, " floats apart: more than can be addressed");
  require(m.data != nullptr || m.rows == 0, name, " has ", m.rows, " rows, but its data is null");
  return {m.data, m.rows, m.cols, m.row_stride};
}

AttentionOptions attention_options(const commvq_attention_options* theirs, Index num_queries) {
  commvq_attention_options options = default_attention_options();
  if (theirs != nullptr) options = read_struct(theirs, options, "commvq_attention_options");
  require_flag(options.causal, "causal");
  require_reserved(options.reserved);
  if (options.causal == 0 && num_queries > 1)
    throw StatusError(COMMVQ_UNSUPPORTED,
                      "causal is 0 with " + std::to_string(num_queries) +
                          " queries; attention that is not causal is computed for one query only");
  AttentionOptions ours;
  ours.scale = options.scale;
  ours.sliding_window = options.sliding_window;
  ours.soft_cap = options.soft_cap;
  return ours;
}

}  // namespace

commvq_status commvq_cache_options_init(commvq_cache_options* options, size_t struct_size) {
  return guarded(
      [&] { write_struct(options, struct_size, default_cache_options(), "commvq_cache_options"); });
}

commvq_status commvq_attention_options_init(commvq_attention_options* options, size_t struct_size) {
  return guarded([&] {
    write_struct(options, struct_size, default_attention_options(), "commvq_attention_options");
  });
}

commvq_status commvq_cache_create(const commvq_codecs* codecs, const commvq_cache_options* options,
                                  commvq_cache** cache) {
  return guarded([&] {
    const ModelCodecs& ours = deref(codecs, "codecs").codecs;
    commvq_cache*& result = deref(cache, "cache");
    commvq_cache_options chosen = default_cache_options();
    if (options != nullptr) chosen = read_struct(options, chosen, "commvq_cache_options");
    result = new commvq_cache{make_cache(ours, chosen)};
  });
}

commvq_status commvq_cache_fork(const commvq_cache* cache, commvq_cache** fork) {
  return guarded([&] {
    const Cache& ours = deref(cache, "cache").cache;
    commvq_cache*& result = deref(fork, "fork");
    result = new commvq_cache{ours.fork()};
  });
}

void commvq_cache_destroy(commvq_cache* cache) {
  delete cache;
}

commvq_status commvq_cache_append(commvq_cache* cache, int32_t layer,
                                  const commvq_const_matrix* keys,
                                  const commvq_const_matrix* values) {
  return guarded([&] {
    LayerCache& ours = deref(cache, "cache").cache.layer(layer);
    ours.append(view_of<const float>(keys, "keys"), view_of<const float>(values, "values"));
  });
}

commvq_status commvq_cache_length(const commvq_cache* cache, int64_t* length) {
  return guarded([&] { deref(length, "length") = deref(cache, "cache").cache.length(); });
}

commvq_status commvq_cache_bytes_per_token(const commvq_cache* cache, double* bytes) {
  return guarded([&] {
    const Cache& ours = deref(cache, "cache").cache;
    double sum = 0;
    for (int layer = 0; layer < ours.num_layers(); ++layer)
      sum += ours.layer(layer).bytes_per_token();
    deref(bytes, "bytes") = sum;
  });
}

commvq_status commvq_cache_allocated_bytes(const commvq_cache* cache, int64_t* bytes) {
  return guarded([&] { deref(bytes, "bytes") = deref(cache, "cache").cache.allocated_bytes(); });
}

commvq_status commvq_cache_truncate(commvq_cache* cache, int64_t length) {
  return guarded([&] { deref(cache, "cache").cache.truncate(length); });
}

commvq_status commvq_cache_clear(commvq_cache* cache) {
  return guarded([&] { deref(cache, "cache").cache.clear(); });
}

commvq_status commvq_cache_attend(const commvq_cache* cache, int32_t layer,
                                  const commvq_const_matrix* queries,
                                  const commvq_attention_options* options,
                                  const commvq_matrix* output, float* lse) {
  return guarded([&] {
    const LayerCache& ours = deref(cache, "cache").cache.layer(layer);
    const auto query_view = view_of<const float>(queries, "queries");
    attend(ours, query_view, attention_options(options, query_view.rows),
           view_of<float>(output, "output"), lse);
  });
}
