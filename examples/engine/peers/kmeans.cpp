#include "engine/peers/kmeans.hpp"

#include <algorithm>
#include <limits>

#include "commvq/core/view.hpp"

#include <omp.h>

namespace engine {
namespace {

using commvq::Index;

/// Points whose distances are in memory at once.
constexpr Index kChunkPoints = 256;

/// Points drawn one by one, far ones more probably.
Points spread_points(const Points& points, int count, std::mt19937_64& random) {
  Points chosen(count, points.cols());
  Eigen::VectorXf distances =
      Eigen::VectorXf::Constant(points.rows(), std::numeric_limits<float>::max());
  Index next = static_cast<Index>(random() % static_cast<std::uint64_t>(points.rows()));
  for (Index c = 0; c < count; ++c) {
    chosen.row(c) = points.row(next);
    distances = distances.cwiseMin((points.rowwise() - chosen.row(c)).rowwise().squaredNorm());
    double left = std::generate_canonical<double, 53>(random) * distances.cast<double>().sum();
    for (next = 0; next + 1 < points.rows() && left >= distances[next]; ++next)
      left -= distances[next];
  }
  return chosen;
}

}  // namespace

std::vector<std::uint16_t> nearest(const Points& points, const Points& centroids) {
  const Index num_chunks = (points.rows() + kChunkPoints - 1) / kChunkPoints;
  const Eigen::RowVectorXf halved_norms = 0.5f * centroids.rowwise().squaredNorm().transpose();
  std::vector<std::uint16_t> result(static_cast<std::size_t>(points.rows()));
#pragma omp parallel for if (num_chunks > 1 && !omp_in_parallel())
  for (Index chunk = 0; chunk < num_chunks; ++chunk) {
    const Index first = chunk * kChunkPoints;
    const Index size = std::min(kChunkPoints, points.rows() - first);
    // |x - c|^2 is smallest where x . c - |c|^2 / 2 is largest.
    Points scores = points.middleRows(first, size) * centroids.transpose();
    scores.rowwise() -= halved_norms;
    for (Index t = 0; t < size; ++t) {
      const float* const row = scores.row(t).data();
      const float* const best = std::find(row, row + scores.cols(), scores.row(t).maxCoeff());
      result[static_cast<std::size_t>(first + t)] = static_cast<std::uint16_t>(best - row);
    }
  }
  return result;
}

Points kmeans(const Points& points, int count, int iterations, std::mt19937_64& random) {
  commvq::require(points.rows() > 0, "there are no points to find clusters of");
  commvq::require(count >= 1 && count <= 65536, "there shall be ", count,
                  " centroids; the number must be in [1, 65536]");
  Points centroids = spread_points(points, count, random);
  for (int i = 0; i < iterations; ++i) {
    const std::vector<std::uint16_t> clusters = nearest(points, centroids);
    Points sums = Points::Zero(count, points.cols());
    std::vector<Index> sizes(static_cast<std::size_t>(count));
    for (Index t = 0; t < points.rows(); ++t) {
      const std::uint16_t cluster = clusters[static_cast<std::size_t>(t)];
      sums.row(cluster) += points.row(t);
      ++sizes[cluster];
    }
    for (Index c = 0; c < count; ++c) {
      const Index size = sizes[static_cast<std::size_t>(c)];
      if (size > 0) {
        centroids.row(c) = sums.row(c) / static_cast<float>(size);
      } else {
        centroids.row(c) =
            points.row(static_cast<Index>(random() % static_cast<std::uint64_t>(points.rows())));
      }
    }
  }
  return centroids;
}

}  // namespace engine
