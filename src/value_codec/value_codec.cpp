#include "commvq/value_codec/value_codec.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "commvq/core/error.hpp"
#include "commvq/core/float16.hpp"
#include "commvq/core/parallel_errors.hpp"

#include <omp.h>

#include "core/hasher.hpp"
#include "core/parallel_product.hpp"
#include "value_codec/value_layers.hpp"
#include "value_codec/value_polish.hpp"

namespace commvq {
namespace {

using value_layers::ConstMatrixMap;
using value_layers::Matrix;

/// Tokens that go through the network together.
constexpr Index kBlockTokens = 128;

constexpr Index kNone = std::numeric_limits<Index>::max();

void check_weight(const std::vector<float>& weight, const char* name, Index rows, Index cols) {
  require(static_cast<Index>(weight.size()) == rows * cols, "value codec: ", name, " has ",
          weight.size(), " elements; the configuration needs ", rows, " x ", cols);
  const auto bad =
      std::find_if_not(weight.begin(), weight.end(), [](float w) { return std::isfinite(w); });
  require(bad == weight.end(), "value codec: ", name, " holds NaN or infinity at element ",
          bad - weight.begin());
}

/// Throws for NaN and infinity, naming the first of them.
void check_finite(MatrixView<const float> values) {
  Index first_bad = kNone;
#pragma omp parallel for reduction(min : first_bad) if (!omp_in_parallel())
  for (Index t = 0; t < values.rows; ++t) {
    bool finite = true;
    for (Index c = 0; c < values.cols; ++c) finite &= std::isfinite(values(t, c));
    if (!finite) first_bad = std::min(first_bad, t);
  }
  if (first_bad == kNone) return;
  Index channel = 0;
  while (std::isfinite(values(first_bad, channel))) ++channel;
  fail("value of token ", first_bad, ", channel ", channel, " is ", values(first_bad, channel),
       "; values must be finite");
}

/// Activations of one block of tokens. Made anew for each: an Eigen matrix that cannot grow for
/// want of memory is broken for good.
struct Block {
  std::vector<double> norms;
  Matrix<float> unit;    // [tokens][C]: values of unit norm, or zero
  Matrix<float> normed;  // [tokens][C]: after LayerNorm; later u
  Matrix<float> hidden;  // [tokens][H]
  Matrix<float> logits;  // [tokens][num_logits]
  Matrix<float> bits;    // [tokens][num_code_bits], 0 or 1
};

void pack_bits(const float* bits, int bytes, std::uint8_t* code) {
  for (int byte = 0; byte < bytes; ++byte) {
    unsigned packed = 0;
    for (int i = 0; i < 8; ++i) packed |= (bits[8 * byte + i] != 0 ? 1u : 0u) << i;
    code[byte] = static_cast<std::uint8_t>(packed);
  }
}

void unpack_bits(const std::uint8_t* code, int bytes, float* bits) {
  for (int byte = 0; byte < bytes; ++byte)
    for (int i = 0; i < 8; ++i) bits[8 * byte + i] = static_cast<float>((code[byte] >> i) & 1);
}

/// Fills `block.bits` with the codes of `values`, and `block.norms`.
void choose_codes(const ValueCodecConfig& config, const ValueCodecWeights& weights,
                  MatrixView<const float> values, Block& block) {
  const Index tokens = values.rows, C = config.num_channels, H = config.hidden_size;
  block.norms.resize(static_cast<std::size_t>(tokens));
  block.unit.resize(tokens, C);
  block.normed.resize(tokens, C);
  for (Index t = 0; t < tokens; ++t) {
    float* const unit = block.unit.row(t).data();
    double& norm = block.norms[static_cast<std::size_t>(t)];
    norm = value_layers::norm_of(values.row(t), C);
    for (Index c = 0; c < C; ++c)
      unit[c] = norm > 0 ? static_cast<float>(values(t, c) / norm) : 0.0f;
    float* const normed = block.normed.row(t).data();
    value_layers::standardize(unit, C, normed);
    for (Index c = 0; c < C; ++c)
      normed[c] = normed[c] * weights.norm_gain[static_cast<std::size_t>(c)] +
                  weights.norm_bias[static_cast<std::size_t>(c)];
  }
  const ConstMatrixMap<float> hidden_weight(weights.hidden_weight.data(), H, C);
  const ConstMatrixMap<float> hidden_bias(weights.hidden_bias.data(), 1, H);
  block.hidden.resize(tokens, H);
  detail::parallel_product(block.normed, hidden_weight.transpose(), block.hidden);
  for (Index t = 0; t < tokens; ++t) {
    block.hidden.row(t) += hidden_bias;
    value_layers::gelu<float>(block.hidden.row(t).data(), H, nullptr);
  }
  const ConstMatrixMap<float> output_weight(weights.output_weight.data(), config.num_logits(), H);
  const ConstMatrixMap<float> output_bias(weights.output_bias.data(), 1, config.num_logits());
  block.logits.resize(tokens, config.num_logits());
  detail::parallel_product(block.hidden, output_weight.transpose(), block.logits);
  block.bits.resize(tokens, config.num_code_bits());
  for (Index t = 0; t < tokens; ++t) {
    block.logits.row(t) += output_bias;
    value_layers::choose_patterns<float>(block.logits.row(t).data(), config.num_groups(),
                                         block.bits.row(t).data());
    if (block.norms[static_cast<std::size_t>(t)] == 0) block.bits.row(t).setZero();
  }
}

/// Every row of `[rows][scales.size()]` divided by the scales, without gaps.
std::vector<float> divided(MatrixView<const float> rows, const std::vector<float>& scales) {
  std::vector<float> result(static_cast<std::size_t>(rows.rows * rows.cols));
  for (Index r = 0; r < rows.rows; ++r)
    for (Index c = 0; c < rows.cols; ++c)
      result[static_cast<std::size_t>(r * rows.cols + c)] =
          rows(r, c) / scales[static_cast<std::size_t>(c)];
  return result;
}

/// Writes |v| / |u| of every token of a block, u in `block.normed`, as bf16 to `scales`. Returns
/// the first token whose scale no bf16 can hold, or the number of tokens.
Index find_scales(const Block& block, std::uint16_t* scales) {
  const Index tokens = block.normed.rows();
  Index first_bad = tokens;
  for (Index t = tokens - 1; t >= 0; --t) {
    const double length = value_layers::norm_of(block.normed.row(t).data(), block.normed.cols());
    const double scale = length > 0 ? block.norms[static_cast<std::size_t>(t)] / length : 0.0;
    scales[t] = to_bf16(static_cast<float>(scale));
    if (!std::isfinite(length) || !std::isfinite(from_bf16(scales[t]))) first_bad = t;
  }
  return first_bad;
}

Digest digest_of(const ValueCodecConfig& config, const ValueCodecWeights& weights) {
  detail::Hasher hasher;
  hasher.add("commvq.values.1");
  for (const int number :
       {config.num_channels, config.bits, config.hidden_size, config.polish_sweeps})
    hasher.add(Index{number});
  for (const std::vector<float>* weight :
       {&weights.norm_gain, &weights.norm_bias, &weights.hidden_weight, &weights.hidden_bias,
        &weights.output_weight, &weights.output_bias, &weights.decoder})
    hasher.add(std::span<const float>(*weight));
  if (!weights.channel_scales.empty()) hasher.add(std::span<const float>(weights.channel_scales));
  return hasher.digest();
}

void check_scales(MatrixView<const std::uint8_t> codes, const std::uint16_t* scales) {
  require(codes.rows == 0 || scales != nullptr, "scales are null; they must hold one number for ",
          "each of the ", codes.rows, " tokens");
}

}  // namespace

void ValueCodecConfig::validate() const {
  require(num_channels >= 8 && num_channels <= 65536 && num_channels % 8 == 0, "num_channels is ",
          num_channels, "; it must be a multiple of 8 in [8, 65536]");
  require(bits == 1 || bits == 2, "bits is ", bits, "; it must be 1 or 2");
  require(hidden_size >= 1 && hidden_size <= 65536, "hidden_size is ", hidden_size,
          "; it must be in [1, 65536]");
  require(polish_sweeps >= 0 && polish_sweeps <= 64, "polish_sweeps is ", polish_sweeps,
          "; it must be in [0, 64]");
}

ValueCodecConfig ValueCodecConfig::commvq(int num_channels, int bits) {
  ValueCodecConfig config = paper(num_channels, bits);
  config.polish_sweeps = 8;
  return config;
}

ValueCodecConfig ValueCodecConfig::paper(int num_channels, int bits) {
  ValueCodecConfig config{num_channels, bits, 1, 0};
  config.validate();
  config.hidden_size = std::min(4096, 2 * num_channels * bits);
  return config;
}

ValueCodec::ValueCodec(const ValueCodecConfig& config, ValueCodecWeights weights)
    : config_(config), weights_(std::move(weights)) {
  config_.validate();
  const Index C = config_.num_channels, H = config_.hidden_size, L = config_.num_logits();
  check_weight(weights_.norm_gain, "norm_gain", 1, C);
  check_weight(weights_.norm_bias, "norm_bias", 1, C);
  check_weight(weights_.hidden_weight, "hidden_weight", H, C);
  check_weight(weights_.hidden_bias, "hidden_bias", 1, H);
  check_weight(weights_.output_weight, "output_weight", L, H);
  check_weight(weights_.output_bias, "output_bias", 1, L);
  check_weight(weights_.decoder, "decoder", config_.num_code_bits(), C);
  if (is_scaled()) {
    check_weight(weights_.channel_scales, "channel_scales", 1, C);
    const auto least =
        std::min_element(weights_.channel_scales.begin(), weights_.channel_scales.end());
    require(*least > 0, "value codec: channel_scales holds ", *least, " for channel ",
            least - weights_.channel_scales.begin(), "; scales must be positive");
    unscaled_decoder_ = divided(decoder(), weights_.channel_scales);
  }
  digest_ = digest_of(config_, weights_);
  if (config_.polish_sweeps == 0) return;
  const std::vector<float>& E = is_scaled() ? unscaled_decoder_ : weights_.decoder;
  const Matrix<float> gram = value_polish::gram_of({E.data(), config_.num_code_bits(), C});
  gram_.assign(gram.data(), gram.data() + gram.size());
}

void ValueCodec::encode(MatrixView<const float> values, MatrixView<std::uint8_t> codes,
                        std::uint16_t* scales) const {
  require(values.cols == config_.num_channels, "values have ", values.cols,
          " channels; the codec has ", config_.num_channels);
  require(codes.rows == values.rows && codes.cols == code_bytes(), "codes are [", codes.rows, ", ",
          codes.cols, "]; they must be [", values.rows, ", ", code_bytes(), "]");
  check_scales(codes, scales);
  check_finite(values);
  std::vector<float> unscaled;
  if (is_scaled()) {
    unscaled = divided(values, weights_.channel_scales);
    values = {unscaled.data(), values.rows, values.cols};
  }

  const std::vector<float>& decoder = is_scaled() ? unscaled_decoder_ : weights_.decoder;
  const ConstMatrixMap<float> E(decoder.data(), config_.num_code_bits(), config_.num_channels);
  const ConstMatrixMap<float> gram(gram_.data(), this->gram().rows, this->gram().cols);
  const Index num_blocks = (values.rows + kBlockTokens - 1) / kBlockTokens;
  Index first_bad = kNone;
  ParallelErrors errors;
#pragma omp parallel for schedule(dynamic) \
    reduction(min                          \
              : first_bad) if (num_blocks > 1 && !omp_in_parallel())
  for (Index b = 0; b < num_blocks; ++b) {
    const Index first = b * kBlockTokens;
    const Index tokens = std::min(kBlockTokens, values.rows - first);
    errors.guard([&] {
      Block block;
      choose_codes(config_, weights_, values.middle_rows(first, tokens), block);
      if (config_.polish_sweeps > 0)
        value_polish::polish(E, gram, block.unit, config_.polish_sweeps, block.bits);
      detail::parallel_product(block.bits, E, block.normed);
      const Index bad = find_scales(block, scales + first);
      if (bad < tokens) first_bad = std::min(first_bad, first + bad);
      for (Index t = 0; t < tokens; ++t)
        pack_bits(block.bits.row(t).data(), code_bytes(), codes.row(first + t));
    });
  }
  errors.rethrow();
  if (first_bad == kNone) return;
  const float* const row = values.row(first_bad);
  const auto largest = std::max_element(row, row + values.cols,
                                        [](float a, float b) { return std::abs(a) < std::abs(b); });
  fail("value of token ", first_bad, " (norm ", value_layers::norm_of(row, values.cols),
       ", largest in channel ", largest - row, ": ", *largest,
       ") needs a scale beyond bf16's range, 3.39e38; scale the values down");
}

void ValueCodec::decode(MatrixView<const std::uint8_t> codes, const std::uint16_t* scales,
                        MatrixView<float> values) const {
  require(codes.cols == code_bytes(), "codes have ", codes.cols, " bytes a token; the codec has ",
          code_bytes());
  require(values.rows == codes.rows && values.cols == config_.num_channels, "values are [",
          values.rows, ", ", values.cols, "]; they must be [", codes.rows, ", ",
          config_.num_channels, "]");
  check_scales(codes, scales);
  for (Index t = 0; t < codes.rows; ++t)
    require(std::isfinite(from_bf16(scales[t])), "scale of token ", t, " is ", from_bf16(scales[t]),
            "; it must be finite");

  const ConstMatrixMap<float> E(weights_.decoder.data(), config_.num_code_bits(),
                                config_.num_channels);
  const Index num_blocks = (codes.rows + kBlockTokens - 1) / kBlockTokens;
  ParallelErrors errors;
#pragma omp parallel for schedule(dynamic) if (num_blocks > 1 && !omp_in_parallel())
  for (Index b = 0; b < num_blocks; ++b) {
    const Index first = b * kBlockTokens;
    const Index tokens = std::min(kBlockTokens, codes.rows - first);
    errors.guard([&] {
      Matrix<float> bits(tokens, config_.num_code_bits());
      for (Index t = 0; t < tokens; ++t)
        unpack_bits(codes.row(first + t), code_bytes(), bits.row(t).data());
      Eigen::Map<Matrix<float>, 0, Eigen::OuterStride<>> out(
          values.row(first), tokens, values.cols, Eigen::OuterStride<>(values.row_stride));
      detail::parallel_product(bits, E, out);
      for (Index t = 0; t < tokens; ++t) out.row(t) *= from_bf16(scales[first + t]);
    });
  }
  errors.rethrow();
}

}  // namespace commvq
