#pragma once

#include <vector>

#include "learner/value_network.hpp"
#include "learner/value_work.hpp"

namespace commvq {

/// On the host.
class HostValueWork final : public ValueWork {
 public:
  /// `values` `[tokens][C]` must outlive the work.
  HostValueWork(MatrixView<const float> values, const ValueCodecConfig& config,
                const ValueCodecWeights& initial);

  double train(const std::vector<Index>& rows, std::uint32_t noise_key, double temperature,
               double learning_rate) override;
  ValueCodecWeights weights() override;
  CodedValues encode(const ValueCodecWeights& weights, const std::vector<Index>& rows) override;

 private:
  using Matrix = ValueNetwork<float>::Matrix;

  void step(double rate);

  MatrixView<const float> values_;
  ValueCodecConfig config_;
  ValueNetwork<float> network_;
  Matrix units_, noise_;
  std::vector<float> first_moments_, second_moments_;
  int steps_ = 0;
};

}  // namespace commvq
