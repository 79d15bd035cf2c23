#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "commvq/core/float16.hpp"
#include "commvq/cuda/decode_attention.hpp"
#include "commvq/cuda/integer_codebook.hpp"

#include "cuda/device.hpp"
#include "reference/attention_reference.hpp"
#include "reference/random_cache.hpp"

/// Random paged caches on the device and what attention over them should be, in double precision.
namespace commvq::cuda::testing_support {

using commvq::testing_support::DeviceArray;
using commvq::testing_support::normal_floats;
using commvq::testing_support::Rng;

struct DecodeCase {
  std::string name;
  KeyCodecConfig keys;
  int num_kv_heads = 2;
  int group = 4;  ///< query heads of a KV head
  int value_bits = 1;
  int value_blocks = 1;
  int page_size = 64;
  std::vector<int> lengths = {300};
  int num_query_tokens = 1;
  int window = 128;
  int sinks = 0;
  int spare = 16;  ///< exact rows beyond what is needed
  FloatType type = FloatType::kFp16;
  float soft_cap = 0;
  int sliding_window = 0;
  RopeLayout layout = RopeLayout::kHalfSplit;
  double theta = 500000.0;

  int head_dim() const { return keys.pairs.head_dim; }
  int num_q_heads() const { return num_kv_heads * group; }
  int batch() const { return static_cast<int>(lengths.size()); }
  int capacity() const { return window > 0 ? window + num_query_tokens - 1 + spare : 0; }
};

inline void PrintTo(const DecodeCase& c, std::ostream* out) {
  *out << c.name;
}

inline KeyCodecConfig key_config(int head_dim, int group_pairs, int codebook_size, int num_stages,
                                 RopeLayout layout = RopeLayout::kHalfSplit) {
  KeyCodecConfig config;
  config.pairs = {head_dim, head_dim, layout};
  config.group_pairs = group_pairs;
  config.codebook_size = codebook_size;
  config.num_stages = num_stages;
  config.tied = false;
  return config;
}

inline std::uint16_t to_bits(FloatType type, float value) {
  return type == FloatType::kBf16 ? to_bf16(value) : to_fp16(value);
}
inline float from_bits(FloatType type, std::uint16_t bits) {
  return type == FloatType::kBf16 ? from_bf16(bits) : from_fp16(bits);
}

/// A case's codecs, pages, exact copies and queries, on the host and on the device.
class DecodeSetup {
 public:
  explicit DecodeSetup(const DecodeCase& c, unsigned seed = 1)
      : case_(c),
        rng_(seed),
        codec_(random_codec()),
        codebooks_(prepare(codec_, rope(), c.page_size)),
        rounded_(rounded_to_integers(*codec_.keys, codebooks_.layout())) {
    make_pages();
    make_exact();
    queries_ = rounded(normal_floats(
        rng_, Index{c.batch()} * c.num_query_tokens * c.num_q_heads() * c.head_dim(), 1.5));
    upload();
  }

  RopeConfig rope() const {
    RopeConfig config;
    config.pairs = case_.keys.pairs;
    config.theta = case_.theta;
    return config;
  }
  const DeviceCodebooks& codebooks() const { return codebooks_; }
  std::size_t output_size() const { return queries_.size(); }

  /// A call with everything but the output filled in.
  DecodeAttention call() {
    DecodeAttention call;
    call.queries = device_queries_->get();
    call.output = device_output_->get();
    call.lse = device_lse_->get();
    call.type = case_.type;
    call.pages = {device_pages_->get(), stride_};
    call.block_table = device_table_->get();
    call.max_blocks = max_blocks_;
    call.seq_lens = device_lengths_->get();
    call.exact = exact_;
    call.exact_slots = exact_.capacity > 0 ? device_slots_->get() : nullptr;
    call.window = case_.window;
    call.soft_cap = case_.soft_cap;
    call.sliding_window = case_.sliding_window;
    call.limits = {case_.batch(), case_.num_query_tokens, case_.num_q_heads(),
                   std::accumulate(case_.lengths.begin(), case_.lengths.end(), Index{0})};
    const std::size_t bytes = decode_workspace_size(codebooks_, call.limits);
    if (!workspace_ || workspace_->size() < bytes) workspace_.emplace(bytes);
    workspace_->fill(0xff);  // NaN wherever a kernel reads what none wrote
    call.workspace = workspace_->get();
    call.workspace_bytes = workspace_->size();
    device_output_->fill(0xff);
    device_lse_->fill(0xff);
    return call;
  }

  std::vector<float> output() const {
    std::vector<float> values;
    for (const std::uint16_t bits : device_output_->to_host())
      values.push_back(from_bits(case_.type, bits));
    return values;
  }
  std::vector<float> lse() const { return device_lse_->to_host(); }

  /// Lengths of the sequences for later calls; each at most that of the case.
  void set_lengths(const std::vector<int>& lengths) {
    case_.lengths = lengths;
    device_lengths_->copy(std::vector<std::int32_t>(lengths.begin(), lengths.end()));
  }

  /// Attention in double precision over what each query sees.
  reference::AttentionResult expected() const {
    reference::AttentionResult result;
    const Rope rope(this->rope());
    AttentionOptions options;
    options.soft_cap = case_.soft_cap;
    options.sliding_window = case_.sliding_window;
    const Index channels = num_channels();
    const int dim = case_.head_dim(), heads = case_.num_q_heads();
    result.output.resize(queries_.size());
    result.lse.resize(queries_.size() / static_cast<std::size_t>(dim));
    for (int seq = 0; seq < case_.batch(); ++seq) {
      const int length = case_.lengths[static_cast<std::size_t>(seq)];
      std::vector<float> keys(static_cast<std::size_t>(length * channels)), values(keys.size());
      for (int i = 0; i < case_.num_query_tokens; ++i) {
        const int position = length - case_.num_query_tokens + i;
        for (int t = 0; t <= position; ++t)
          seen(seq, position, t, &keys[static_cast<std::size_t>(t * channels)],
               &values[static_cast<std::size_t>(t * channels)]);
        for (int h = 0; h < heads; ++h) {
          const std::size_t row =
              static_cast<std::size_t>((seq * case_.num_query_tokens + i) * heads + h);
          result.lse[row] = reference::attend_head(
              rope, &queries_[row * static_cast<std::size_t>(dim)], position,
              {keys.data(), position + 1, channels}, {values.data(), position + 1, channels},
              Index{h / case_.group} * dim, options,
              &result.output[row * static_cast<std::size_t>(dim)]);
        }
      }
    }
    return result;
  }

 private:
  Index num_channels() const { return Index{case_.num_kv_heads} * case_.head_dim(); }

  LayerCodec random_codec() {
    return {commvq::testing_support::random_key_codec(rng_, case_.keys, case_.num_kv_heads),
            commvq::testing_support::random_value_codec(rng_, static_cast<int>(num_channels()),
                                                        case_.value_bits, 4, case_.value_blocks,
                                                        case_.keys.graded)};
  }

  std::vector<float> rounded(std::vector<float> values) const {
    for (float& value : values) value = from_bits(case_.type, to_bits(case_.type, value));
    return values;
  }

  /// Codes drawn at random, for every token of every sequence, in pages in random order.
  void make_pages() {
    const DevicePageLayout& layout = codebooks_.layout();
    stride_ = layout.page_bytes + 32;
    std::vector<int> num_pages;
    for (const int length : case_.lengths)
      num_pages.push_back((length + case_.page_size - 1) / case_.page_size);
    max_blocks_ = *std::max_element(num_pages.begin(), num_pages.end()) + 1;
    const int total = std::accumulate(num_pages.begin(), num_pages.end(), 0) + 3;
    std::vector<int> order(static_cast<std::size_t>(total));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng_);
    pages_.assign(static_cast<std::size_t>(total * stride_), 0xff);
    table_.assign(static_cast<std::size_t>(max_blocks_ * case_.batch()),
                  1 << 30);  // not to be read
    std::size_t used = 0;
    for (int seq = 0; seq < case_.batch(); ++seq)
      for (int i = 0; i < num_pages[static_cast<std::size_t>(seq)]; ++i)
        table_[static_cast<std::size_t>(seq * max_blocks_ + i)] = order[used++];
    codes_.resize(case_.lengths.size());
    const double key_norm = std::sqrt(static_cast<double>(num_channels()));
    for (int seq = 0; seq < case_.batch(); ++seq)
      for (int t = 0; t < case_.lengths[static_cast<std::size_t>(seq)]; ++t) {
        Token token;
        for (int i = 0; i < case_.num_kv_heads * case_.keys.num_codes(); ++i)
          token.codes.push_back(
              static_cast<std::uint16_t>(rng_() % static_cast<unsigned>(case_.keys.codebook_size)));
        for (int i = 0; i < layout.num_code_bits / 8; ++i)
          token.value.push_back(static_cast<std::uint8_t>(rng_()));
        const double spread = 0.5 + static_cast<double>(rng_() % 1000) / 1000;
        for (int i = 0; i < layout.norms_per_token; ++i)
          token.norms.push_back(to_bf16(
              static_cast<float>(key_norm * (0.5 + static_cast<double>(rng_() % 1000) / 1000))));
        for (int i = 0; i < layout.value_blocks; ++i)
          token.scales.push_back(
              rng_() % 16 == 0 ? 0 : to_bf16(static_cast<float>(spread * spread * (i + 1))));
        std::uint8_t* const page =
            pages_.data() +
            table_[static_cast<std::size_t>(seq * max_blocks_ + t / case_.page_size)] * stride_;
        put_token(layout, page, t % case_.page_size, token.codes.data(), token.norms.data(),
                  token.value.data(), token.scales.data());
        codes_[static_cast<std::size_t>(seq)].push_back(std::move(token));
      }
  }

  void make_exact() {
    exact_.type = case_.type;
    exact_.sinks = case_.sinks;
    exact_.capacity = case_.capacity();
    if (exact_.capacity == 0) return;
    for (int seq = 0; seq < case_.batch(); ++seq) slots_.push_back(case_.batch() - 1 - seq);
    const auto size =
        static_cast<std::size_t>(Index{case_.batch()} * exact_.rows_per_slot() * num_channels());
    exact_keys_.assign(size, NAN);
    exact_values_.assign(size, NAN);
    for (int seq = 0; seq < case_.batch(); ++seq)
      for (int t = 0; t < case_.lengths[static_cast<std::size_t>(seq)]; ++t) {
        const Index row = exact_.row(slots_[static_cast<std::size_t>(seq)], t);
        const auto k = rounded(normal_floats(rng_, num_channels()));
        const auto v = rounded(normal_floats(rng_, num_channels()));
        std::copy(k.begin(), k.end(), exact_keys_.begin() + row * num_channels());
        std::copy(v.begin(), v.end(), exact_values_.begin() + row * num_channels());
      }
  }

  /// Key and value of a token as the query at `position` sees it.
  void seen(int seq, int position, int token, float* keys, float* values) const {
    const int length = case_.lengths[static_cast<std::size_t>(seq)];
    const bool in_window =
        exact_.capacity > 0 && token > position - case_.window && token >= length - exact_.capacity;
    if (token < exact_.sinks || in_window) {
      const Index at = exact_.row(slots_[static_cast<std::size_t>(seq)], token) * num_channels();
      std::copy_n(exact_keys_.begin() + at, num_channels(), keys);
      std::copy_n(exact_values_.begin() + at, num_channels(), values);
      return;
    }
    const Token& t = codes_[static_cast<std::size_t>(seq)][static_cast<std::size_t>(token)];
    rounded_.decode({t.codes.data(), 1, static_cast<Index>(t.codes.size())}, t.norms.data(),
                    {keys, 1, num_channels()});
    codec_.values->decode({t.value.data(), 1, static_cast<Index>(t.value.size())}, t.scales.data(),
                          {values, 1, num_channels()});
  }

  std::vector<std::uint16_t> bits_of(const std::vector<float>& values) const {
    std::vector<std::uint16_t> bits;
    for (const float value : values) bits.push_back(to_bits(case_.type, value));
    return bits;
  }

  void upload() {
    device_pages_.emplace(pages_);
    device_table_.emplace(table_);
    device_lengths_.emplace(std::vector<std::int32_t>(case_.lengths.begin(), case_.lengths.end()));
    device_queries_.emplace(bits_of(queries_));
    device_output_.emplace(queries_.size());
    device_lse_.emplace(queries_.size() / static_cast<std::size_t>(case_.head_dim()));
    if (exact_.capacity == 0) return;
    device_slots_.emplace(std::vector<std::int32_t>(slots_.begin(), slots_.end()));
    device_exact_keys_.emplace(bits_of(exact_keys_));
    device_exact_values_.emplace(bits_of(exact_values_));
    exact_.keys = device_exact_keys_->get();
    exact_.values = device_exact_values_->get();
  }

  struct Token {
    std::vector<std::uint16_t> codes;
    std::vector<std::uint8_t> value;
    std::vector<std::uint16_t> norms;
    std::vector<std::uint16_t> scales;
  };

  DecodeCase case_;
  Rng rng_;
  LayerCodec codec_;
  DeviceCodebooks codebooks_;
  KeyCodec rounded_;
  Index stride_ = 0;
  int max_blocks_ = 0;
  std::vector<std::uint8_t> pages_;
  std::vector<std::int32_t> table_;
  std::vector<std::vector<Token>> codes_;
  ExactTokens exact_;
  std::vector<int> slots_;
  std::vector<float> exact_keys_, exact_values_, queries_;
  std::optional<DeviceArray<std::uint8_t>> device_pages_, workspace_;
  std::optional<DeviceArray<std::int32_t>> device_table_, device_lengths_, device_slots_;
  std::optional<DeviceArray<std::uint16_t>> device_queries_, device_output_, device_exact_keys_,
      device_exact_values_;
  std::optional<DeviceArray<float>> device_lse_;
};

}  // namespace commvq::cuda::testing_support
