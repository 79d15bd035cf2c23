#pragma once

#include <Eigen/Core>

#include "engine/peers/peer_codec.hpp"

namespace engine {

/// The levels of Lloyd and Max for a standard normal variable: 2^bits of them, rising, each the
/// mean of its cell, and the cells' borders halfway between. Throws `commvq::Error` unless bits is
/// in [1, 8].
std::vector<float> lloyd_max_levels(int bits);

/// Random rotation and Lloyd-Max levels, as TurboQuant's quantiser of least squared error (arXiv
/// 2504.19874): each head is divided by its norm, which is kept in FP16, and turned by a random
/// orthogonal matrix, after which its channels are nearly normal, of variance 1 / head_dim. So
/// b + 16 / head_dim bits a number.
class RotationCodec final : public PeerCodec {
 public:
  /// Every head gets a rotation of its own, drawn from `seed`.
  RotationCodec(int bits, int num_heads, int head_dim, std::uint64_t seed);

  int code_bits() const override { return bits_; }
  PeerCodes encode(MatrixView<const float> rows) const override;
  void decode(const PeerCodes& codes, MatrixView<float> rows) const override;

 private:
  int bits_;
  Index head_dim_;
  std::vector<float> levels_;
  std::vector<Eigen::MatrixXf> rotations_;  // one a head
};

}  // namespace engine
