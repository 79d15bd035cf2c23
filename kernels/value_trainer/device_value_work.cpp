#include "value_trainer/device_value_work.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels.hpp"

namespace commvq::cuda {
namespace {

constexpr auto kAsIs = Blas::Form::kAsIs;
constexpr auto kTransposed = Blas::Form::kTransposed;

/// Values that are encoded at a time.
constexpr Index kEncodedTokens = 4096;

/// Calls `use(offset, vector)` for every parameter.
template <class At, class Weights, class Use>
void for_each_parameter(At& at, Weights& weights, Use use) {
  use(at.norm_gain, weights.norm_gain);
  use(at.norm_bias, weights.norm_bias);
  use(at.hidden_weight, weights.hidden_weight);
  use(at.hidden_bias, weights.hidden_bias);
  use(at.output_weight, weights.output_weight);
  use(at.output_bias, weights.output_bias);
  use(at.decoder, weights.decoder);
}

}  // namespace

DeviceValueWork::Parameters::Parameters(const ValueCodecWeights& weights) {
  for_each_parameter(*this, weights, [&](Index& offset, const std::vector<float>& values) {
    offset = size;
    size += (static_cast<Index>(values.size()) + 3) / 4 * 4;
  });
}

DeviceValueWork::Activations::Activations(const ValueCodecConfig& config, Index tokens)
    : rows(tokens),
      norms(tokens),
      units(tokens * config.num_channels),
      standardized(tokens * config.num_channels),
      scaled(tokens * config.num_channels),
      hidden(tokens * config.hidden_size),
      slope(tokens * config.hidden_size),
      logits(tokens * config.num_logits()),
      bits(tokens * config.num_code_bits()),
      decoded(tokens * config.num_channels),
      losses(tokens) {}

DeviceValueWork::DeviceValueWork(MatrixView<const float> values, const ValueCodecConfig& config,
                                 const ValueCodecWeights& initial)
    : config_(config),
      weights_(initial),
      at_(initial),
      values_(values.rows * values.cols),
      parameters_(at_.size),
      gradients_(at_.size),
      first_moments_(at_.size),
      second_moments_(at_.size) {
  for (Index t = 0; t < values.rows; ++t)
    check(cudaMemcpyAsync(values_.data() + t * values.cols, values.row(t),
                          static_cast<std::size_t>(values.cols) * sizeof(float),
                          cudaMemcpyHostToDevice, stream()),
          "copying values to the device");
  upload(initial, parameters_);
  gradients_.clear(stream());
  first_moments_.clear(stream());
  second_moments_.clear(stream());
  check_kernels("copying values to the device");
}

void DeviceValueWork::check_kernels(const char* what) const {
  check(cudaGetLastError(), what);
  check(cudaStreamSynchronize(stream()), what);
}

void DeviceValueWork::upload(const ValueCodecWeights& weights, DeviceArray<float>& to) {
  std::vector<float> image(static_cast<std::size_t>(at_.size), 0.0f);
  for_each_parameter(at_, weights, [&](Index offset, const std::vector<float>& values) {
    std::copy(values.begin(), values.end(), image.begin() + offset);
  });
  to.upload(image.data(), at_.size, stream());
}

ValueCodecWeights DeviceValueWork::weights() {
  const std::vector<float> image = parameters_.download(stream());
  for_each_parameter(at_, weights_, [&](Index offset, std::vector<float>& values) {
    std::copy_n(image.begin() + offset, values.size(), values.begin());
  });
  return weights_;
}

void DeviceValueWork::forward(const DeviceArray<float>& parameters, Index tokens,
                              std::uint32_t noise_key, float temperature, Activations& batch) {
  const Index C = config_.num_channels, H = config_.hidden_size, L = config_.num_logits();
  const float* const p = parameters.data();
  value_trainer::load_units(
      {tokens, C, values_.data(), batch.rows.data(), p + at_.norm_gain, p + at_.norm_bias,
       batch.units.data(), batch.standardized.data(), batch.scaled.data(), batch.norms.data()},
      stream());
  blas_.multiply(kAsIs, kTransposed, tokens, H, C, 1.0f, batch.scaled.data(), p + at_.hidden_weight,
                 0.0f, batch.hidden.data());
  value_trainer::apply_gelu(tokens, H, p + at_.hidden_bias, batch.hidden.data(),
                            temperature > 0 ? batch.slope.data() : nullptr, stream());
  blas_.multiply(kAsIs, kTransposed, tokens, L, H, 1.0f, batch.hidden.data(), p + at_.output_weight,
                 0.0f, batch.logits.data());
  value_trainer::choose_patterns(tokens, config_.num_groups(), p + at_.output_bias, noise_key,
                                 temperature, batch.logits.data(), batch.bits.data(), stream());
}

double DeviceValueWork::train(const std::vector<Index>& rows, std::uint32_t noise_key,
                              double temperature, double learning_rate) {
  const auto tokens = static_cast<Index>(rows.size());
  const Index C = config_.num_channels, H = config_.hidden_size;
  if (batch_ == nullptr || batch_->rows.size() != tokens) {
    batch_ = std::make_unique<Activations>(config_, tokens);
    hidden_gradients_ = DeviceArray<float>(tokens * H);
    scaled_gradients_ = DeviceArray<float>(tokens * C);
    bit_gradients_ = DeviceArray<float>(tokens * config_.num_code_bits());
  }
  batch_->rows.upload(rows.data(), tokens, stream());
  const auto t = static_cast<float>(temperature);
  forward(parameters_, tokens, noise_key, t, *batch_);
  blas_.multiply(kAsIs, kAsIs, tokens, C, config_.num_code_bits(), 1.0f, batch_->bits.data(),
                 parameters_.data() + at_.decoder, 0.0f, batch_->decoded.data());
  value_trainer::restore_norms(tokens, C, batch_->units.data(), batch_->decoded.data(),
                               batch_->losses.data(), stream());
  backward(tokens, t, *batch_);
  ++steps_;
  const double correction = std::sqrt(1 - std::pow(0.999, steps_)) / (1 - std::pow(0.9, steps_));
  value_trainer::adam_step(at_.size, static_cast<float>(learning_rate * correction),
                           gradients_.data(), first_moments_.data(), second_moments_.data(),
                           parameters_.data(), stream());
  if (config_.graded)
    value_trainer::tie_decoder(config_.num_code_bits(), C, parameters_.data() + at_.decoder,
                               stream());
  check_kernels("training the value codec");
  const std::vector<float> losses = batch_->losses.download(stream());
  return std::accumulate(losses.begin(), losses.end(), 0.0) / static_cast<double>(tokens);
}

void DeviceValueWork::backward(Index tokens, float temperature, Activations& batch) {
  const Index C = config_.num_channels, H = config_.hidden_size, L = config_.num_logits();
  const Index bits = config_.num_code_bits();
  const float* const p = parameters_.data();
  float* const g = gradients_.data();
  blas_.multiply(kTransposed, kAsIs, bits, C, tokens, 1.0f, batch.bits.data(), batch.decoded.data(),
                 0.0f, g + at_.decoder);
  blas_.multiply(kAsIs, kTransposed, tokens, bits, C, 1.0f, batch.decoded.data(), p + at_.decoder,
                 0.0f, bit_gradients_.data());
  value_trainer::backward_through_choice(tokens, config_.num_groups(), bit_gradients_.data(),
                                         temperature, batch.logits.data(), stream());
  blas_.multiply(kTransposed, kAsIs, L, H, tokens, 1.0f, batch.logits.data(), batch.hidden.data(),
                 0.0f, g + at_.output_weight);
  value_trainer::sum_columns(tokens, L, batch.logits.data(), nullptr, g + at_.output_bias,
                             stream());
  blas_.multiply(kAsIs, kAsIs, tokens, H, L, 1.0f, batch.logits.data(), p + at_.output_weight, 0.0f,
                 hidden_gradients_.data());
  value_trainer::multiply_each(tokens * H, batch.slope.data(), hidden_gradients_.data(), stream());
  blas_.multiply(kTransposed, kAsIs, H, C, tokens, 1.0f, hidden_gradients_.data(),
                 batch.scaled.data(), 0.0f, g + at_.hidden_weight);
  value_trainer::sum_columns(tokens, H, hidden_gradients_.data(), nullptr, g + at_.hidden_bias,
                             stream());
  blas_.multiply(kAsIs, kAsIs, tokens, C, H, 1.0f, hidden_gradients_.data(), p + at_.hidden_weight,
                 0.0f, scaled_gradients_.data());
  value_trainer::sum_columns(tokens, C, scaled_gradients_.data(), batch.standardized.data(),
                             g + at_.norm_gain, stream());
  value_trainer::sum_columns(tokens, C, scaled_gradients_.data(), nullptr, g + at_.norm_bias,
                             stream());
}

/// The batch's logits and hidden units serve as memory.
void DeviceValueWork::polish(const float* decoder, const float* gram, Index tokens,
                             Activations& batch) {
  const Index C = config_.num_channels, bits = config_.num_code_bits();
  float* const value_products = batch.logits.data();
  float* const sum_products = value_products + tokens * bits;
  blas_.multiply(kAsIs, kTransposed, tokens, bits, C, 1.0f, batch.units.data(), decoder, 0.0f,
                 value_products);
  blas_.multiply(kAsIs, kAsIs, tokens, bits, bits, 1.0f, batch.bits.data(), gram, 0.0f,
                 sum_products);
  const bool fits =
      value_trainer::polish(tokens, static_cast<int>(bits), config_.polish_sweeps, config_.graded,
                            gram, value_products, sum_products, batch.bits.data(), stream());
  require(fits, "the polish of ", bits,
          " code bits needs more shared memory than the device has: learn on the host");
}

CodedValues DeviceValueWork::encode(const ValueCodecWeights& weights,
                                    const std::vector<Index>& rows) {
  const Index C = config_.num_channels, bits = config_.num_code_bits();
  const auto num_rows = static_cast<Index>(rows.size());
  DeviceArray<float> parameters(at_.size), gram(bits * bits), normal(bits * bits), right(bits * C);
  upload(weights, parameters);
  normal.clear(stream());
  right.clear(stream());
  const float* const decoder = parameters.data() + at_.decoder;
  blas_.multiply(kAsIs, kTransposed, bits, bits, C, 1.0f, decoder, decoder, 0.0f, gram.data());
  const Index batch_tokens = std::min(kEncodedTokens, num_rows);
  Activations batch(config_, batch_tokens);
  CodedValues result;
  for (Index first = 0; first < num_rows; first += batch_tokens) {
    const Index tokens = std::min(batch_tokens, num_rows - first);
    batch.rows.upload(rows.data() + first, tokens, stream());
    forward(parameters, tokens, 0, 0.0f, batch);
    if (config_.polish_sweeps > 0) polish(decoder, gram.data(), tokens, batch);
    blas_.multiply(kAsIs, kAsIs, tokens, C, bits, 1.0f, batch.bits.data(), decoder, 0.0f,
                   batch.decoded.data());
    value_trainer::scale_bits(tokens, C, bits, batch.norms.data(), batch.units.data(),
                              batch.decoded.data(), batch.bits.data(), batch.losses.data(),
                              stream());
    blas_.multiply(kTransposed, kAsIs, bits, bits, tokens, 1.0f, batch.bits.data(),
                   batch.bits.data(), 1.0f, normal.data());
    blas_.multiply(kTransposed, kAsIs, bits, C, tokens, 1.0f, batch.bits.data(), batch.units.data(),
                   1.0f, right.data());
    check_kernels("encoding values");
    std::vector<float> errors(static_cast<std::size_t>(tokens));
    batch.losses.download(errors.data(), tokens, stream());
    for (const float error : errors) result.relative_error += error;
  }
  result.relative_error /= static_cast<double>(num_rows);
  const std::vector<float> n = normal.download(stream()), r = right.download(stream());
  // N is symmetric.
  result.normal = Eigen::Map<const Eigen::MatrixXf>(n.data(), bits, bits).cast<double>();
  result.right =
      Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>(
          r.data(), bits, C)
          .cast<double>();
  return result;
}

}  // namespace commvq::cuda
