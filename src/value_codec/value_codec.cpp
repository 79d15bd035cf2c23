#include "commvq/value_codec/value_codec.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "commvq/core/error.hpp"
#include "commvq/core/float16.hpp"
#include "commvq/core/graded_bits.hpp"
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

/// Tokens that go through the networks together.
constexpr Index kChunkTokens = 128;

constexpr Index kNone = std::numeric_limits<Index>::max();

void check_weight(const std::vector<float>& weight, const char* name, Index rows, Index cols) {
  require(static_cast<Index>(weight.size()) == rows * cols, "value codec: ", name, " has ",
          weight.size(), " elements; the configuration needs ", rows, " x ", cols);
  const auto bad =
      std::find_if_not(weight.begin(), weight.end(), [](float w) { return std::isfinite(w); });
  require(bad == weight.end(), "value codec: ", name, " holds NaN or infinity at element ",
          bad - weight.begin());
}

/// Throws unless the rows of a number's bits are multiples of one row. `decoder` is
/// `[B][bits of a block][C]`.
void check_graded(MatrixView<const float> decoder, int block_bits) {
  for (Index row = 0; row < decoder.rows; ++row) {
    const int i = static_cast<int>(row % block_bits);
    const GradedBit bit = graded_bit(i);
    const int last = graded_last_bit(i);
    for (Index c = 0; c < decoder.cols; ++c) {
      const float given = decoder(row, c);
      const float needed = float(bit.weight) * decoder(row - i + last, c);
      require(given == needed, "value codec: the decoder is not graded: in block ",
              row / block_bits, ", channel ", c, ", the row of bit ", i, " is ", given,
              "; it must be ", bit.weight, " times that of bit ", last, ", ", needed);
    }
  }
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

/// Activations of a chunk of tokens in one block. Made anew for each: an Eigen matrix that cannot
/// grow for want of memory is broken for good.
struct Activations {
  std::vector<double> norms;
  Matrix<float> unit;    // [tokens][C]: values of unit norm, or zero
  Matrix<float> normed;  // [tokens][C]: after LayerNorm; later u
  Matrix<float> hidden;  // [tokens][H]
  Matrix<float> logits;  // [tokens][num_logits]
  Matrix<float> bits;    // [tokens][num_code_bits], 0 or 1
};

/// A block's rows of a matrix in which blocks of `[rows][cols]` follow one another.
ConstMatrixMap<float> rows_of(const std::vector<float>& blocks, Index block, Index rows,
                              Index cols) {
  return {blocks.data() + block * rows * cols, rows, cols};
}

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

/// Fills `result.bits` with the network's codes of `values`, those of block `index`, and
/// `result.norms`. `config` is that of one block.
void choose_codes(const ValueCodecConfig& config, const ValueCodecWeights& weights, Index index,
                  MatrixView<const float> values, Activations& result) {
  const Index tokens = values.rows, C = config.num_channels, H = config.hidden_size;
  const Index L = config.num_logits();
  const float* const gain = weights.norm_gain.data() + index * C;
  const float* const bias = weights.norm_bias.data() + index * C;
  result.norms.resize(static_cast<std::size_t>(tokens));
  result.unit.resize(tokens, C);
  result.normed.resize(tokens, C);
  for (Index t = 0; t < tokens; ++t) {
    float* const unit = result.unit.row(t).data();
    double& norm = result.norms[static_cast<std::size_t>(t)];
    norm = value_layers::norm_of(values.row(t), C);
    for (Index c = 0; c < C; ++c)
      unit[c] = norm > 0 ? static_cast<float>(values(t, c) / norm) : 0.0f;
    float* const normed = result.normed.row(t).data();
    value_layers::standardize(unit, C, normed);
    for (Index c = 0; c < C; ++c) normed[c] = normed[c] * gain[c] + bias[c];
  }
  const auto hidden_weight = rows_of(weights.hidden_weight, index, H, C);
  const auto hidden_bias = rows_of(weights.hidden_bias, index, 1, H);
  result.hidden.resize(tokens, H);
  detail::parallel_product(result.normed, hidden_weight.transpose(), result.hidden);
  for (Index t = 0; t < tokens; ++t) {
    result.hidden.row(t) += hidden_bias;
    value_layers::gelu<float>(result.hidden.row(t).data(), H, nullptr);
  }
  const auto output_weight = rows_of(weights.output_weight, index, L, H);
  const auto output_bias = rows_of(weights.output_bias, index, 1, L);
  result.logits.resize(tokens, L);
  detail::parallel_product(result.hidden, output_weight.transpose(), result.logits);
  result.bits.resize(tokens, config.num_code_bits());
  for (Index t = 0; t < tokens; ++t) {
    result.logits.row(t) += output_bias;
    value_layers::choose_patterns<float>(result.logits.row(t).data(), config.num_groups(),
                                         result.bits.row(t).data());
    if (result.norms[static_cast<std::size_t>(t)] == 0) result.bits.row(t).setZero();
  }
}

/// Every row divided by the scales, one a column, without gaps.
std::vector<float> divided(MatrixView<const float> rows, const float* scales) {
  std::vector<float> result(static_cast<std::size_t>(rows.rows * rows.cols));
  for (Index r = 0; r < rows.rows; ++r)
    for (Index c = 0; c < rows.cols; ++c)
      result[static_cast<std::size_t>(r * rows.cols + c)] = rows(r, c) / scales[c];
  return result;
}

/// Writes |v| / |u| of every token of a chunk, u in `block.normed`, as bf16 to `scales`, `stride`
/// apart. Returns the first token whose scale no bf16 can hold, or the number of tokens.
Index find_scales(const Activations& block, std::uint16_t* scales, Index stride) {
  const Index tokens = block.normed.rows();
  Index first_bad = tokens;
  for (Index t = tokens - 1; t >= 0; --t) {
    const double length = value_layers::norm_of(block.normed.row(t).data(), block.normed.cols());
    const double scale = length > 0 ? block.norms[static_cast<std::size_t>(t)] / length : 0.0;
    scales[t * stride] = to_bf16(static_cast<float>(scale));
    if (!std::isfinite(length) || !std::isfinite(from_bf16(scales[t * stride]))) first_bad = t;
  }
  return first_bad;
}

Digest digest_of(const ValueCodecConfig& config, const ValueCodecWeights& weights) {
  detail::Hasher hasher;
  hasher.add("commvq.values.1");
  for (const int number :
       {config.num_channels, config.bits, config.hidden_size, config.polish_sweeps})
    hasher.add(Index{number});
  if (config.num_blocks > 1) hasher.add(Index{config.num_blocks});
  if (config.graded) hasher.add("graded");
  ValueCodecWeights::for_each([&](auto weight) {
    if (!(weights.*weight).empty()) hasher.add(std::span<const float>(weights.*weight));
  });
  return hasher.digest();
}

void check_scales(MatrixView<const std::uint8_t> codes, const std::uint16_t* scales,
                  int num_blocks) {
  require(codes.rows == 0 || scales != nullptr, "scales are null; they must hold ", num_blocks,
          " for each of the ", codes.rows, " tokens");
}

}  // namespace

void ValueCodecConfig::validate() const {
  require(num_channels >= 8 && num_channels <= 65536 && num_channels % 8 == 0, "num_channels is ",
          num_channels, "; it must be a multiple of 8 in [8, 65536]");
  require(num_blocks >= 1 && num_channels % num_blocks == 0 && num_channels / num_blocks % 8 == 0,
          "num_blocks is ", num_blocks, "; it must cut num_channels = ", num_channels,
          " into blocks of a multiple of 8 channels");
  require(bits == 1 || bits == 2, "bits is ", bits, "; it must be 1 or 2");
  require(hidden_size >= 1 && hidden_size <= 65536, "hidden_size is ", hidden_size,
          "; it must be in [1, 65536]");
  require(polish_sweeps >= 0 && polish_sweeps <= 64, "polish_sweeps is ", polish_sweeps,
          "; it must be in [0, 64]");
}

ValueCodecConfig ValueCodecConfig::speed(int num_channels, int num_kv_heads, int bits) {
  require(num_kv_heads >= 1 && num_channels % num_kv_heads == 0, "num_kv_heads is ", num_kv_heads,
          "; it must divide the ", num_channels, " channels");
  return commvq(num_channels / num_kv_heads, bits).repeated(num_kv_heads);
}

ValueCodecConfig ValueCodecConfig::commvq(int num_channels, int bits) {
  ValueCodecConfig config = paper(num_channels, bits);
  config.polish_sweeps = 8;
  config.graded = true;
  return config;
}

ValueCodecConfig ValueCodecConfig::paper(int num_channels, int bits) {
  ValueCodecConfig config{num_channels, bits, 1, 0};
  config.validate();
  config.hidden_size = std::min(4096, 2 * num_channels * bits);
  return config;
}

void ValueCodecWeights::derive_graded_rows(Index channels) {
  const auto num_bits = static_cast<int>(static_cast<Index>(decoder.size()) / channels);
  for (Index bit = 0; bit < num_bits; ++bit) {
    const Index last = graded_last_bit(static_cast<int>(bit));
    const auto weight = static_cast<float>(graded_bit(static_cast<int>(bit)).weight);
    for (Index c = 0; c < channels; ++c)
      decoder[static_cast<std::size_t>(bit * channels + c)] =
          weight * decoder[static_cast<std::size_t>(last * channels + c)];
  }
}

ValueCodec::ValueCodec(const ValueCodecConfig& config, ValueCodecWeights weights)
    : config_(config), weights_(std::move(weights)) {
  config_.validate();
  const ValueCodecConfig one = config_.block();
  const Index B = config_.num_blocks, C = one.num_channels, H = one.hidden_size;
  const Index L = config_.num_logits(), bits = one.num_code_bits();
  check_weight(weights_.norm_gain, "norm_gain", B, C);
  check_weight(weights_.norm_bias, "norm_bias", B, C);
  check_weight(weights_.hidden_weight, "hidden_weight", B * H, C);
  check_weight(weights_.hidden_bias, "hidden_bias", B, H);
  check_weight(weights_.output_weight, "output_weight", L, H);
  check_weight(weights_.output_bias, "output_bias", 1, L);
  check_weight(weights_.decoder, "decoder", B * bits, C);
  if (config_.graded) check_graded(decoder(), one.num_code_bits());
  if (is_scaled()) {
    check_weight(weights_.channel_scales, "channel_scales", B, C);
    const auto least =
        std::min_element(weights_.channel_scales.begin(), weights_.channel_scales.end());
    require(*least > 0, "value codec: channel_scales holds ", *least, " for channel ",
            least - weights_.channel_scales.begin(), "; scales must be positive");
    for (Index b = 0; b < B; ++b) {
      const std::vector<float> rows =
          divided(decoder().middle_rows(b * bits, bits), weights_.channel_scales.data() + b * C);
      unscaled_decoder_.insert(unscaled_decoder_.end(), rows.begin(), rows.end());
    }
  }
  digest_ = digest_of(config_, weights_);
  if (config_.polish_sweeps == 0) return;
  for (Index b = 0; b < B; ++b) {
    const Matrix<float> gram = value_polish::gram_of(rows_of(encoder_decoder(), b, bits, C));
    gram_.insert(gram_.end(), gram.data(), gram.data() + gram.size());
  }
}

void ValueCodec::encode(MatrixView<const float> values, MatrixView<std::uint8_t> codes,
                        std::uint16_t* scales) const {
  require(values.cols == config_.num_channels, "values have ", values.cols,
          " channels; the codec has ", config_.num_channels);
  require(codes.rows == values.rows && codes.cols == code_bytes(), "codes are [", codes.rows, ", ",
          codes.cols, "]; they must be [", values.rows, ", ", code_bytes(), "]");
  check_scales(codes, scales, config_.num_blocks);
  check_finite(values);
  std::vector<float> unscaled;
  if (is_scaled()) {
    unscaled = divided(values, weights_.channel_scales.data());
    values = {unscaled.data(), values.rows, values.cols};
  }

  const ValueCodecConfig one = config_.block();
  const Index B = config_.num_blocks, C = one.num_channels, bits = one.num_code_bits();
  const int bytes = one.num_code_bits() / 8;
  const Index num_items = (values.rows + kChunkTokens - 1) / kChunkTokens * B;
  Index first_bad = kNone;  // token * B + block
  ParallelErrors errors;
#pragma omp parallel for schedule(dynamic) \
    reduction(min                          \
              : first_bad) if (num_items > 1 && !omp_in_parallel())
  for (Index item = 0; item < num_items; ++item) {
    const Index first = item / B * kChunkTokens, b = item % B;
    const Index tokens = std::min(kChunkTokens, values.rows - first);
    errors.guard([&] {
      const auto E = rows_of(encoder_decoder(), b, bits, C);
      Activations block;
      choose_codes(one, weights_, b, values.middle_rows(first, tokens).middle_cols(b * C, C),
                   block);
      if (one.polish_sweeps > 0)
        value_polish::polish(E, rows_of(gram_, b, bits, bits), block.unit, one.polish_sweeps,
                             one.graded, block.bits);
      detail::parallel_product(block.bits, E, block.normed);
      const Index bad = find_scales(block, scales + first * B + b, B);
      if (bad < tokens) first_bad = std::min(first_bad, (first + bad) * B + b);
      for (Index t = 0; t < tokens; ++t)
        pack_bits(block.bits.row(t).data(), bytes, codes.row(first + t) + b * bytes);
    });
  }
  errors.rethrow();
  if (first_bad == kNone) return;
  const Index first_channel = first_bad % B * C;
  const float* const row = values.row(first_bad / B) + first_channel;
  const auto largest =
      std::max_element(row, row + C, [](float a, float b) { return std::abs(a) < std::abs(b); });
  fail("value of token ", first_bad / B, " (norm ", value_layers::norm_of(row, C),
       ", largest in channel ", first_channel + (largest - row), ": ", *largest,
       ") needs a scale beyond bf16's range, 3.39e38; scale the values down");
}

void ValueCodec::decode(MatrixView<const std::uint8_t> codes, const std::uint16_t* scales,
                        MatrixView<float> values) const {
  require(codes.cols == code_bytes(), "codes have ", codes.cols, " bytes a token; the codec has ",
          code_bytes());
  require(values.rows == codes.rows && values.cols == config_.num_channels, "values are [",
          values.rows, ", ", values.cols, "]; they must be [", codes.rows, ", ",
          config_.num_channels, "]");
  const ValueCodecConfig one = config_.block();
  const Index B = config_.num_blocks, C = one.num_channels, num_bits = one.num_code_bits();
  check_scales(codes, scales, config_.num_blocks);
  for (Index i = 0; i < codes.rows * B; ++i)
    require(std::isfinite(from_bf16(scales[i])), "scale of token ", i / B, " is ",
            from_bf16(scales[i]), "; it must be finite");

  const int bytes = one.num_code_bits() / 8;
  const Index num_items = (codes.rows + kChunkTokens - 1) / kChunkTokens * B;
  ParallelErrors errors;
#pragma omp parallel for schedule(dynamic) if (num_items > 1 && !omp_in_parallel())
  for (Index item = 0; item < num_items; ++item) {
    const Index first = item / B * kChunkTokens, b = item % B;
    const Index tokens = std::min(kChunkTokens, codes.rows - first);
    errors.guard([&] {
      Matrix<float> bits(tokens, num_bits);
      for (Index t = 0; t < tokens; ++t)
        unpack_bits(codes.row(first + t) + b * bytes, bytes, bits.row(t).data());
      Eigen::Map<Matrix<float>, 0, Eigen::OuterStride<>> out(
          values.row(first) + b * C, tokens, C, Eigen::OuterStride<>(values.row_stride));
      detail::parallel_product(bits, rows_of(weights_.decoder, b, num_bits, C), out);
      for (Index t = 0; t < tokens; ++t) out.row(t) *= from_bf16(scales[(first + t) * B + b]);
    });
  }
  errors.rethrow();
}

}  // namespace commvq
