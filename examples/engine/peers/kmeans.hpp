#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include <Eigen/Core>

namespace engine {

/// Rows are points.
using Points = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// The nearest centroid of every point; the first wins a tie.
std::vector<std::uint16_t> nearest(const Points& points, const Points& centroids);

/// `count` centroids that minimise the sum over points of |x - c(x)|^2, c(x) the nearest: begins
/// with k-means++ (points drawn with probability proportional to their squared distance from those
/// drawn before) and makes `iterations` rounds of Lloyd's algorithm. A centroid that no point is
/// nearest to becomes a point drawn at random. Throws `commvq::Error` for no points and unless
/// count is in [1, 65536].
Points kmeans(const Points& points, int count, int iterations, std::mt19937_64& random);

}  // namespace engine
