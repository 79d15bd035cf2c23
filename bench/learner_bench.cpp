// One EM step of one stage of one key head (head_dim 128, 64 centroids, 4,096 keys). The yardstick
// is the same step in plain FP32: all Nc^2 distances, all weights.

#include <vector>

#include <benchmark/benchmark.h>

#include "learner/key_em.hpp"
#include "llama_layer.hpp"

namespace {

using namespace commvq;
using namespace commvq::bench;
using key_em::Matrix;

constexpr Index kTokens = 4096;
constexpr Index kSize = 64;

struct Stage {
  Matrix residuals, books;
};

/// Unit keys, and centroids of about their spread.
Stage random_stage() {
  Rng rng(1);
  Stage stage;
  const std::vector<float> keys = normal_floats(rng, kTokens * kHeadDim, 1.0);
  stage.residuals = Eigen::Map<const Matrix>(keys.data(), kTokens, kHeadDim);
  stage.residuals.rowwise().normalize();
  const std::vector<float> rows = normal_floats(rng, 2 * kSize * kHeadDim, 0.03);
  stage.books = Eigen::Map<const Matrix>(rows.data(), 2 * kSize, kHeadDim);
  key_em::tie(stage.books);
  return stage;
}

/// 1e-3 is the first temperature of the schedule, 1e-5 the last.
double temperature_of(const benchmark::State& state) {
  return 1e-6 * static_cast<double>(state.range(0));
}

void em_step(benchmark::State& state) {
  const Stage stage = random_stage();
  const double temperature = temperature_of(state);
  for (auto _ : state) {
    const auto statistics = key_em::soft_assign(key_em::residuals_of(stage.residuals), stage.books,
                                                temperature, kTokens);
    benchmark::DoNotOptimize(key_em::solve_books(statistics, stage.books, true));
  }
}

/// The E step without leaving anything out: p(A, B | x) over all centres.
key_em::Statistics assign_densely(const Stage& stage, double temperature) {
  Matrix centres(kSize * kSize, kHeadDim);
  for (Index i = 0; i < centres.rows(); ++i)
    centres.row(i) = stage.books.row(i / kSize) + stage.books.row(kSize + i % kSize);
  Matrix p = 2.0f * stage.residuals * centres.transpose();
  p.rowwise() -= centres.rowwise().squaredNorm().transpose();
  Matrix margins(kTokens, 2 * kSize);
  double squared_error = 0;
#pragma omp parallel for reduction(+ : squared_error)
  for (Index t = 0; t < kTokens; ++t) {
    const float largest = p.row(t).maxCoeff();
    squared_error += stage.residuals.row(t).squaredNorm() - largest;
    p.row(t) = ((p.row(t).array() - largest) / static_cast<float>(temperature)).exp();
    p.row(t) /= p.row(t).sum();
    const Eigen::Map<const Matrix> pairs(p.row(t).data(), kSize, kSize);
    margins.row(t).head(kSize) = pairs.rowwise().sum();
    margins.row(t).tail(kSize) = pairs.colwise().sum();
  }
  const Eigen::RowVectorXf weights = p.colwise().sum();
  key_em::Statistics result;
  result.squared_error = squared_error;
  result.pair_weights = Eigen::Map<const Matrix>(weights.data(), kSize, kSize).cast<double>();
  result.sums = (margins.transpose() * stage.residuals).cast<double>();
  return result;
}

void em_step_exact_fp32(benchmark::State& state) {
  const Stage stage = random_stage();
  const double temperature = temperature_of(state);
  for (auto _ : state) {
    const auto statistics = assign_densely(stage, temperature);
    benchmark::DoNotOptimize(key_em::solve_books(statistics, stage.books, true));
  }
}

void at_temperatures(benchmark::internal::Benchmark* bench) {
  bench->ArgName("temperature_1e-6")
      ->Arg(10000)
      ->Arg(1000)
      ->Arg(10)
      ->UseRealTime()
      ->Unit(benchmark::kMillisecond);
}

BENCHMARK(em_step)->Apply(at_temperatures);
BENCHMARK(em_step_exact_fp32)->Apply(at_temperatures);

}  // namespace
