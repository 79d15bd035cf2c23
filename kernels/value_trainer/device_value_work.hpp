#pragma once

#include <vector>

#include "learner/value_work.hpp"

#include "common/blas.hpp"
#include "common/device_array.hpp"

namespace commvq::cuda {

/// The value trainer's work on the current device: values, network and moments stay there.
class DeviceValueWork final : public ValueWork {
 public:
  /// Copies values and weights. Throws `Error` for lack of memory.
  DeviceValueWork(MatrixView<const float> values, const ValueCodecConfig& config,
                  const ValueCodecWeights& initial);

  double train(const std::vector<Index>& rows, std::uint32_t noise_key, double temperature,
               double learning_rate) override;
  ValueCodecWeights weights() override;
  CodedValues encode(const ValueCodecWeights& weights, const std::vector<Index>& rows) override;

 private:
  /// Where each parameter begins, one after the other in the order of `ValueCodecWeights`, each on
  /// 16 bytes.
  struct Parameters {
    explicit Parameters(const ValueCodecWeights& weights);
    Index norm_gain, norm_bias, hidden_weight, hidden_bias, output_weight, output_bias, decoder;
    Index size = 0;  ///< of all
  };
  /// What a batch of values becomes on its way through the network.
  struct Activations {
    Activations(const ValueCodecConfig& config, Index tokens);
    DeviceArray<Index> rows;
    DeviceArray<double> norms;
    DeviceArray<float> units, standardized, scaled, hidden, slope, logits, bits, decoded, losses;
  };

  cudaStream_t stream() const { return blas_.stream(); }
  void check_kernels(const char* what) const;
  void upload(const ValueCodecWeights& weights, DeviceArray<float>& to);
  /// Units to bits; a temperature of 0 leaves out noise and what only the backward pass needs.
  void forward(const DeviceArray<float>& parameters, Index tokens, std::uint32_t noise_key,
               float temperature, Activations& batch);
  void backward(Index tokens, float temperature, Activations& batch);
  void polish(const float* decoder, const float* gram, Index tokens, Activations& batch);

  ValueCodecConfig config_;
  ValueCodecWeights weights_;  // as they were when last asked for
  Parameters at_;
  Blas blas_;
  DeviceArray<float> values_;  // [tokens][C]
  DeviceArray<float> parameters_, gradients_, first_moments_, second_moments_;
  std::unique_ptr<Activations> batch_;  // of training
  DeviceArray<float> hidden_gradients_, scaled_gradients_, bit_gradients_;
  int steps_ = 0;
};

}  // namespace commvq::cuda
