#include "engine/device_cache.hpp"

#include <algorithm>
#include <numeric>

#include "commvq/cache/exact_store.hpp"
#include "commvq/core/error.hpp"
#include "commvq/cuda/decode_attention.hpp"

#include <cuda_runtime_api.h>

namespace engine {
namespace {

namespace cuda = commvq::cuda;

void check(cudaError_t error, const char* what) {
  commvq::require(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

/// Bytes of device memory.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t size) : size_(size) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, std::max<std::size_t>(1, size)), "allocating device memory");
    memory_ = {memory, [](void* p) { cudaFree(p); }};
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(memory_.get());
  }
  std::size_t size() const { return size_; }
  void upload(std::size_t offset, const void* source, std::size_t bytes) const {
    check(cudaMemcpy(as<std::uint8_t>() + offset, source, bytes, cudaMemcpyHostToDevice),
          "copying to the device");
  }
  void download(void* target, std::size_t bytes) const {
    check(cudaMemcpy(target, memory_.get(), bytes, cudaMemcpyDeviceToHost),
          "copying from the device");
  }

 private:
  std::size_t size_;
  std::shared_ptr<void> memory_;
};

/// The rows in FP16, without gaps.
std::vector<std::uint8_t> to_fp16(MatrixView<const float> rows) {
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(rows.rows * rows.cols) * 2);
  for (Index t = 0; t < rows.rows; ++t)
    commvq::round_floats(rows.row(t), rows.cols, commvq::FloatType::kFp16,
                         bytes.data() + t * rows.cols * 2);
  return bytes;
}

std::vector<float> to_floats(const std::vector<std::uint8_t>& fp16) {
  std::vector<float> values(fp16.size() / 2);
  commvq::widen_floats(fp16.data(), static_cast<Index>(values.size()), commvq::FloatType::kFp16,
                       values.data());
  return values;
}

/// Pages and exact copies of one layer.
class DeviceLayer {
 public:
  DeviceLayer(const commvq::LayerCodec& codec, const commvq::RopeConfig& rope, Index max_tokens,
              cuda::ExactTokens exact)
      : codec_(codec),
        codebooks_(cuda::prepare(codec, rope)),
        num_pages_((max_tokens + layout().page_size - 1) / layout().page_size),
        host_pages_(static_cast<std::size_t>(num_pages_) *
                    static_cast<std::size_t>(layout().page_bytes)),
        pages_(host_pages_.size()),
        exact_keys_(exact_bytes(exact)),
        exact_values_(exact_bytes(exact)),
        exact_(exact) {
    exact_.keys = exact_keys_.as<void>();
    exact_.values = exact_values_.as<void>();
  }

  const cuda::DeviceCodebooks& codebooks() const { return codebooks_; }
  const cuda::ExactTokens& exact() const { return exact_; }
  cuda::PagedCodes pages() const { return {pages_.as<std::uint8_t>(), layout().page_bytes}; }
  Index num_pages() const { return num_pages_; }
  Index length() const { return length_; }
  Index allocated_bytes() const {
    return static_cast<Index>(pages_.size() + exact_keys_.size() + exact_values_.size());
  }

  void append(MatrixView<const float> keys, MatrixView<const float> values) {
    const std::vector<std::uint8_t> exact_keys = to_fp16(keys), exact_values = to_fp16(values);
    put_codes(to_floats(exact_keys), to_floats(exact_values), keys.rows, keys.cols);
    const auto row_bytes = static_cast<std::size_t>(keys.cols) * 2;
    for (Index t = 0; t < keys.rows; ++t) {
      const auto row = static_cast<std::size_t>(exact_.row(0, length_ + t));
      const std::size_t at = static_cast<std::size_t>(t) * row_bytes;
      exact_keys_.upload(row * row_bytes, &exact_keys[at], row_bytes);
      exact_values_.upload(row * row_bytes, &exact_values[at], row_bytes);
    }
    length_ += keys.rows;
  }

 private:
  const cuda::DevicePageLayout& layout() const { return codebooks_.layout(); }
  std::size_t exact_bytes(const cuda::ExactTokens& exact) const {
    return static_cast<std::size_t>(exact.rows_per_slot()) *
           static_cast<std::size_t>(layout().num_kv_heads * layout().head_dim) * 2;
  }

  /// Codes the tokens and copies the pages that they touch.
  void put_codes(const std::vector<float>& keys, const std::vector<float>& values, Index tokens,
                 Index channels) {
    const Index num_codes = Index{codec_.keys->num_kv_heads()} * codec_.keys->config().num_codes();
    const Index num_norms = codec_.keys->num_norms(), code_bytes = codec_.values->code_bytes();
    std::vector<std::uint16_t> codes(static_cast<std::size_t>(tokens * num_codes));
    std::vector<std::uint16_t> norms(static_cast<std::size_t>(tokens * num_norms));
    std::vector<std::uint8_t> value_codes(static_cast<std::size_t>(tokens * code_bytes));
    const Index num_scales = codec_.values->config().num_blocks;
    std::vector<std::uint16_t> scales(static_cast<std::size_t>(tokens * num_scales));
    codec_.keys->encode({keys.data(), tokens, channels}, {codes.data(), tokens, num_codes},
                        norms.data());
    codec_.values->encode({values.data(), tokens, channels},
                          {value_codes.data(), tokens, code_bytes}, scales.data());
    const Index size = layout().page_size, bytes = layout().page_bytes;
    for (Index t = 0; t < tokens; ++t)
      cuda::put_token(layout(), host_pages_.data() + (length_ + t) / size * bytes,
                      static_cast<int>((length_ + t) % size),
                      &codes[static_cast<std::size_t>(t * num_codes)],
                      &norms[static_cast<std::size_t>(t * num_norms)],
                      &value_codes[static_cast<std::size_t>(t * code_bytes)],
                      &scales[static_cast<std::size_t>(t * num_scales)]);
    const Index first = length_ / size * bytes, end = ((length_ + tokens - 1) / size + 1) * bytes;
    pages_.upload(static_cast<std::size_t>(first), host_pages_.data() + first,
                  static_cast<std::size_t>(end - first));
  }

  commvq::LayerCodec codec_;
  cuda::DeviceCodebooks codebooks_;
  Index num_pages_;
  std::vector<std::uint8_t> host_pages_;
  DeviceMemory pages_, exact_keys_, exact_values_;
  cuda::ExactTokens exact_;
  Index length_ = 0;
};

class DeviceCache : public SequenceCache {
 public:
  /// Queries of one call of `decode_attention`.
  static constexpr int kMaxQueries = 16;

  DeviceCache(const ModelConfig& config, const std::vector<commvq::LayerCodec>& codecs,
              Index max_tokens, int window, int sinks)
      : max_tokens_(max_tokens),
        window_(window),
        num_q_heads_(config.num_q_heads),
        queries_(static_cast<std::size_t>(kMaxQueries * config.q_size()) * 2),
        output_(queries_.size()),
        numbers_(2 * sizeof(std::int32_t)) {
    commvq::require(static_cast<int>(codecs.size()) == config.num_layers, "codecs for ",
                    codecs.size(), " layers; the model has ", config.num_layers);
    const cuda::ExactTokens exact{nullptr, nullptr, commvq::FloatType::kFp16, sinks,
                                  window + kMaxQueries - 1};
    for (const commvq::LayerCodec& codec : codecs)
      layers_.emplace_back(codec, config.rope, max_tokens, exact);
    std::vector<std::int32_t> table(static_cast<std::size_t>(layers_[0].num_pages()));
    std::iota(table.begin(), table.end(), 0);
    table_ = std::make_unique<DeviceMemory>(table.size() * sizeof(std::int32_t));
    table_->upload(0, table.data(), table_->size());
    std::size_t bytes = 0;
    for (const DeviceLayer& layer : layers_)
      for (int count = 1; count <= kMaxQueries; ++count)
        bytes = std::max(bytes, cuda::decode_workspace_size(layer.codebooks(), limits(count)));
    workspace_ = std::make_unique<DeviceMemory>(bytes);
  }

  void append_and_attend(int layer, MatrixView<const float> queries, MatrixView<const float> keys,
                         MatrixView<const float> values, Index sliding_window,
                         MatrixView<float> attended) override {
    DeviceLayer& device = layers_.at(static_cast<std::size_t>(layer));
    commvq::require(device.length() + keys.rows <= max_tokens_, device.length(), " tokens and ",
                    keys.rows, " more; the device cache was made for ", max_tokens_);
    // A query finds exact copies of its window only if few tokens came after it.
    for (Index first = 0; first < queries.rows; first += kMaxQueries) {
      const Index count = std::min<Index>(kMaxQueries, queries.rows - first);
      device.append(keys.middle_rows(first, count), values.middle_rows(first, count));
      attend(device, queries.middle_rows(first, count), sliding_window,
             attended.middle_rows(first, count));
    }
  }

  Index length() const override {
    Index least = layers_[0].length();
    for (const DeviceLayer& layer : layers_) least = std::min(least, layer.length());
    return least;
  }
  Index allocated_bytes() const override {
    Index bytes = 0;
    for (const DeviceLayer& layer : layers_) bytes += layer.allocated_bytes();
    return bytes;
  }

 private:
  cuda::DecodeLimits limits(int num_queries) const {
    return {1, num_queries, num_q_heads_, max_tokens_};
  }

  void attend(const DeviceLayer& layer, MatrixView<const float> queries, Index sliding_window,
              MatrixView<float> attended) {
    std::vector<std::uint8_t> rows = to_fp16(queries);
    queries_.upload(0, rows.data(), rows.size());
    const std::int32_t numbers[2] = {static_cast<std::int32_t>(layer.length()), 0};
    numbers_.upload(0, numbers, sizeof numbers);
    cuda::DecodeAttention call;
    call.queries = queries_.as<void>();
    call.output = output_.as<void>();
    call.type = commvq::FloatType::kFp16;
    call.pages = layer.pages();
    call.block_table = table_->as<std::int32_t>();
    call.max_blocks = static_cast<int>(layer.num_pages());
    call.seq_lens = numbers_.as<std::int32_t>();
    call.exact = layer.exact();
    call.exact_slots = numbers_.as<std::int32_t>() + 1;
    call.window = window_;
    call.sliding_window = static_cast<int>(sliding_window);
    call.limits = limits(static_cast<int>(queries.rows));
    call.workspace = workspace_->as<void>();
    call.workspace_bytes = workspace_->size();
    const cuda::Status status = cuda::decode_attention(layer.codebooks(), call);
    commvq::require(status.ok(), "attention on the device: ", status.message());
    output_.download(rows.data(), rows.size());
    for (Index t = 0; t < attended.rows; ++t)
      commvq::widen_floats(rows.data() + t * attended.cols * 2, attended.cols,
                           commvq::FloatType::kFp16, attended.row(t));
  }

  Index max_tokens_;
  int window_;
  int num_q_heads_;
  DeviceMemory queries_, output_;
  DeviceMemory numbers_;  ///< the sequence's length and its slot
  std::unique_ptr<DeviceMemory> table_, workspace_;
  std::vector<DeviceLayer> layers_;
};

}  // namespace

std::unique_ptr<SequenceCache> make_device_cache(const ModelConfig& config,
                                                 const std::vector<commvq::LayerCodec>& codecs,
                                                 Index max_tokens, int window, int sinks) {
  return std::make_unique<DeviceCache>(config, codecs, max_tokens, window, sinks);
}

}  // namespace engine
