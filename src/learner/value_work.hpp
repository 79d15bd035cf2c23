#pragma once

#include <cstdint>
#include <vector>

#include "commvq/value_codec/value_codec.hpp"

#include <Eigen/Core>

namespace commvq {

/// What least squares for the decoder needs of values that a codec has coded, v ~ |v| s E^T b.
struct CodedValues {
  double relative_error = 0;  ///< mean of |v - decoded|^2 / |v|^2
  Eigen::MatrixXd normal;     ///< [num_code_bits][num_code_bits]: sum of s^2 b b^T
  Eigen::MatrixXd right;      ///< [num_code_bits][C]: sum of s b (v / |v|)^T
};

/// What training a value codec asks of the values at once, so that network and values may lie where
/// the work is done.
class ValueWork {
 public:
  virtual ~ValueWork() = default;

  /// One step of Adam on a batch: the values `rows`, logits perturbed by Gumbel noise that
  /// `noise_key` determines. A graded decoder is tied afterwards. Returns the loss before the step.
  virtual double train(const std::vector<Index>& rows, std::uint32_t noise_key, double temperature,
                       double learning_rate) = 0;
  /// The network as it is now.
  virtual ValueCodecWeights weights() = 0;
  /// Codes the values `rows`, polish included.
  virtual CodedValues encode(const ValueCodecWeights& weights, const std::vector<Index>& rows) = 0;
};

}  // namespace commvq
