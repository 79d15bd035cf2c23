#include "learner/key_em.hpp"

#include <random>

#include <gtest/gtest.h>

#include "reference/key_em_reference.hpp"

namespace commvq {
namespace {

constexpr Index kTokens = 300;
constexpr Index kCentroids = 6;
constexpr Index kPairs = 4;

class KeyEm : public testing::TestWithParam<bool> {
 protected:
  KeyEm() : residuals_(kTokens, 2 * kPairs), books_(2 * kCentroids, 2 * kPairs) {
    std::mt19937_64 rng(4);
    std::normal_distribution<float> normal;
    for (Index i = 0; i < residuals_.size(); ++i) residuals_.data()[i] = normal(rng);
    for (Index i = 0; i < books_.size(); ++i) books_.data()[i] = normal(rng);
    if (tied()) key_em::tie(books_);
  }
  static bool tied() { return GetParam(); }
  static reference::ComplexMatrix first(const key_em::Matrix& books) {
    return reference::to_complex(books.topRows(kCentroids).cast<double>());
  }
  static reference::ComplexMatrix second(const key_em::Matrix& books) {
    return reference::to_complex(books.bottomRows(kCentroids).cast<double>());
  }
  reference::ComplexMatrix x() const { return reference::to_complex(residuals_.cast<double>()); }

  key_em::Matrix residuals_, books_;
};

TEST_P(KeyEm, StatisticsEqualTheReferences) {
  for (const double temperature : {1.0, 0.05}) {
    const auto p = reference::soft_assignment(x(), first(books_), second(books_), temperature);
    const key_em::Statistics found =
        key_em::soft_assign(key_em::residuals_of(residuals_), books_, temperature, 64);
    for (Index a = 0; a < kCentroids; ++a)
      for (Index b = 0; b < kCentroids; ++b)
        EXPECT_NEAR(found.pair_weights(a, b), p.col(a * kCentroids + b).sum(), 2e-3);
    Eigen::MatrixXd sums = Eigen::MatrixXd::Zero(2 * kCentroids, 2 * kPairs);
    double error = 0;
    for (Index t = 0; t < kTokens; ++t) {
      double least = 1e300;
      for (Index a = 0; a < kCentroids; ++a)
        for (Index b = 0; b < kCentroids; ++b) {
          const Eigen::RowVectorXd row = residuals_.row(t).cast<double>();
          sums.row(a) += p(t, a * kCentroids + b) * row;
          sums.row(kCentroids + b) += p(t, a * kCentroids + b) * row;
          least = std::min(
              least, (x().row(t) - first(books_).row(a) - second(books_).row(b)).squaredNorm());
        }
      error += least;
    }
    EXPECT_LT((found.sums - sums).cwiseAbs().maxCoeff(), 3e-3);
    EXPECT_NEAR(found.squared_error, error, 1e-4 * error);
  }
}

TEST_P(KeyEm, BatchSizeChangesOnlyRounding) {
  const auto small = key_em::soft_assign(key_em::residuals_of(residuals_), books_, 0.3, 7);
  const auto large = key_em::soft_assign(key_em::residuals_of(residuals_), books_, 0.3, 4096);
  EXPECT_LT((small.pair_weights - large.pair_weights).cwiseAbs().maxCoeff(), 1e-3);
  EXPECT_NEAR(small.squared_error, large.squared_error, 1e-4 * large.squared_error);
}

TEST_P(KeyEm, SolvedBooksAreStationary) {
  const double temperature = 0.3;
  const auto p = reference::soft_assignment(x(), first(books_), second(books_), temperature);
  const key_em::Matrix solved = key_em::solve_books(
      key_em::soft_assign(key_em::residuals_of(residuals_), books_, temperature, 64), books_,
      tied());
  const double before = reference::soft_objective(x(), p, first(books_), second(books_));
  const double after = reference::soft_objective(x(), p, first(solved), second(solved));
  EXPECT_LT(after, 0.99 * before);
  // No small change of any entry does better, beyond rounding.
  for (Index row = 0; row < (tied() ? kCentroids : 2 * kCentroids); ++row)
    for (Index col = 0; col < 2 * kPairs; ++col)
      for (const float step : {-0.02f, 0.02f}) {
        key_em::Matrix moved = solved;
        moved(row, col) += step;
        if (tied()) key_em::tie(moved);
        EXPECT_GE(reference::soft_objective(x(), p, first(moved), second(moved)),
                  after * (1 - 1e-6));
      }
}

TEST_P(KeyEm, TiedSolutionEqualsTheReferences) {
  if (!tied()) return;  // Untied books are determined only up to a shift.
  const auto p = reference::soft_assignment(x(), first(books_), second(books_), 0.3);
  const auto expected = reference::solve_tied(x(), p, kCentroids);
  const key_em::Matrix solved = key_em::solve_books(
      key_em::soft_assign(key_em::residuals_of(residuals_), books_, 0.3, 64), books_, true);
  EXPECT_LT((first(solved) - expected).cwiseAbs().maxCoeff(), 2e-3);
  EXPECT_LT((second(solved) - std::complex<double>(0, 1) * expected).cwiseAbs().maxCoeff(), 2e-3);
}

TEST_P(KeyEm, FindsTheNearestCentre) {
  std::vector<std::uint16_t> codes(kTokens * 3, 99);
  key_em::find_nearest(key_em::residuals_of(residuals_), books_, codes.data(), 3);
  double left = 0;
  for (Index t = 0; t < kTokens; ++t) {
    const std::uint16_t* const code = &codes[static_cast<std::size_t>(3 * t)];
    ASSERT_LT(code[0], kCentroids);
    ASSERT_LT(code[1], kCentroids);
    ASSERT_EQ(code[2], 99);
    left += (residuals_.row(t) - books_.row(code[0]) - books_.row(kCentroids + code[1]))
                .cast<double>()
                .squaredNorm();
  }
  const auto statistics = key_em::soft_assign(key_em::residuals_of(residuals_), books_, 1.0, 64);
  EXPECT_NEAR(left, statistics.squared_error, 1e-4 * left);
}

INSTANTIATE_TEST_SUITE_P(Ties, KeyEm, testing::Bool(),
                         [](const auto& books) { return books.param ? "tied" : "untied"; });

}  // namespace
}  // namespace commvq
