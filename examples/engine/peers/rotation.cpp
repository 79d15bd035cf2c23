#include "engine/peers/rotation.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <random>

#include "commvq/core/float16.hpp"

#include <Eigen/QR>

namespace engine {
namespace {

double normal_density(double x) {
  return std::exp(-0.5 * x * x) / std::sqrt(2 * std::numbers::pi);
}
double normal_distribution(double x) {
  return 0.5 * std::erfc(-x / std::numbers::sqrt2);
}

/// A rotation drawn evenly from all of them: Q of a normal matrix whose R has a positive diagonal.
Eigen::MatrixXf random_rotation(Index size, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  Eigen::MatrixXd gaussian(size, size);
  for (Index i = 0; i < gaussian.size(); ++i) gaussian.data()[i] = normal(random);
  const Eigen::HouseholderQR<Eigen::MatrixXd> qr(gaussian);
  Eigen::MatrixXd rotation = qr.householderQ();
  for (Index i = 0; i < size; ++i)
    if (qr.matrixQR()(i, i) < 0) rotation.col(i) *= -1;
  return rotation.cast<float>();
}

}  // namespace

std::vector<float> lloyd_max_levels(int bits) {
  commvq::require(bits >= 1 && bits <= 8, "a Lloyd-Max code has ", bits,
                  " bits; it must have 1 to 8");
  const int count = 1 << bits;
  std::vector<double> levels;
  levels.reserve(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) levels.push_back(4.0 * (i + 0.5) / count - 2.0);
  // Alternates borders and means until no level moves.
  for (double moved = 1; moved > 1e-9;) {
    moved = 0;
    double low = -std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < levels.size(); ++i) {
      const double high = i + 1 < levels.size() ? (levels[i] + levels[i + 1]) / 2
                                                : std::numeric_limits<double>::infinity();
      const double mean = (normal_density(low) - normal_density(high)) /
                          (normal_distribution(high) - normal_distribution(low));
      moved = std::max(moved, std::abs(mean - levels[i]));
      levels[i] = mean;
      low = high;
    }
  }
  return {levels.begin(), levels.end()};
}

RotationCodec::RotationCodec(int bits, int num_heads, int head_dim, std::uint64_t seed)
    : bits_(bits), head_dim_(head_dim), levels_(lloyd_max_levels(bits)) {
  std::mt19937_64 random(seed);
  for (int head = 0; head < num_heads; ++head)
    rotations_.push_back(random_rotation(head_dim, random));
}

PeerCodes RotationCodec::encode(MatrixView<const float> rows) const {
  std::vector<float> borders;
  for (std::size_t i = 0; i + 1 < levels_.size(); ++i)
    borders.push_back((levels_[i] + levels_[i + 1]) / 2);
  const float spread = std::sqrt(static_cast<float>(head_dim_));
  PeerCodes result;
  for (Index t = 0; t < rows.rows; ++t)
    for (std::size_t head = 0; head < rotations_.size(); ++head) {
      const Eigen::Map<const Eigen::VectorXf> x(rows.row(t) + static_cast<Index>(head) * head_dim_,
                                                head_dim_);
      const float norm = x.norm();
      const Eigen::VectorXf turned = rotations_[head] * x * (norm > 0 ? spread / norm : 0.0f);
      for (const float number : turned)
        result.codes.push_back(static_cast<std::uint16_t>(
            std::upper_bound(borders.begin(), borders.end(), number) - borders.begin()));
      result.halves.push_back(commvq::to_fp16(norm));
    }
  return result;
}

void RotationCodec::decode(const PeerCodes& codes, MatrixView<float> rows) const {
  const float spread = std::sqrt(static_cast<float>(head_dim_));
  auto code = codes.codes.begin();
  auto half = codes.halves.begin();
  Eigen::VectorXf turned(head_dim_);
  for (Index t = 0; t < rows.rows; ++t)
    for (std::size_t head = 0; head < rotations_.size(); ++head) {
      for (float& number : turned) number = levels_[*code++];
      Eigen::Map<Eigen::VectorXf>(rows.row(t) + static_cast<Index>(head) * head_dim_, head_dim_) =
          rotations_[head].transpose() * turned * (commvq::from_fp16(*half++) / spread);
    }
}

}  // namespace engine
