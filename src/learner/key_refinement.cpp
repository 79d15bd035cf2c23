#include "learner/key_refinement.hpp"

#include <complex>
#include <utility>

#include <Eigen/Cholesky>

#include "core/parallel_product.hpp"
#include "learner/graded_books.hpp"

namespace commvq {
namespace {

using Complex = std::complex<double>;
using Books = Eigen::Map<key_em::Matrix>;

/// change of (N + lambda I) change = right - N old, lambda = ridge * mean diagonal: the proximal
/// term lambda |U - old|^2. One Cholesky factorisation, in the place of N, serves all pairs.
template <class Matrix>
Matrix change_of(Matrix& normal, const Matrix& right, const Matrix& old, double ridge) {
  Matrix target(old.rows(), old.cols());
  detail::parallel_product(normal, old, target);
  target = right - target;
  normal.diagonal().array() += ridge * normal.diagonal().real().mean();
  return Eigen::LLT<Eigen::Ref<Matrix>>(normal).solve(target);
}

/// Untied books: the rows U that minimise the sum over keys of |x - sum_k U[row_k]|^2.
void solve_untied(const Occurrences& keys, double ridge, int group, KeyCodebook<float>& codebook) {
  Books books(codebook.book(group, 0, 0), keys.sums.rows(), keys.sums.cols());
  const Eigen::MatrixXd old = books.cast<double>();
  Eigen::MatrixXd normal = keys.counts;
  books = (old + change_of(normal, keys.sums, old, ridge)).cast<float>();
}

/// Graded books: the rows U = A V of the centre and the directions V that minimise the same.
void solve_graded(const Occurrences& keys, double ridge, int group, KeyCodebook<float>& codebook) {
  const Eigen::VectorXd shares = graded_books::shares_of(keys);
  const Eigen::MatrixXd tie = graded_books::tie_of(shares);
  const Eigen::MatrixXd old = graded_books::parameters_of(codebook, group, shares);
  Eigen::MatrixXd normal = tie.transpose() * keys.counts * tie;
  const Eigen::MatrixXd right = tie.transpose() * keys.sums;
  Books(codebook.book(group, 0, 0), keys.sums.rows(), keys.sums.cols()) =
      (tie * (old + change_of(normal, right, old, ridge))).cast<float>();
}

/// Tied books: the complex rows U, one book a stage, where the codes of book A have weight 1 and
/// those of book B weight j.
void solve_tied(const Occurrences& keys, double ridge, int group, KeyCodebook<float>& codebook) {
  const Index size = codebook.config.codebook_size, stages = codebook.config.num_stages;
  const Index g = codebook.config.group_pairs;
  const Complex j(0, 1);
  const auto complex_rows = [g](const auto& planar) -> Eigen::MatrixXcd {
    return planar.leftCols(g).template cast<Complex>() +
           Complex(0, 1) * planar.rightCols(g).template cast<Complex>();
  };
  Eigen::MatrixXcd normal(stages * size, stages * size), right(stages * size, g);
  Eigen::MatrixXcd old(stages * size, g);
  for (Index stage = 0; stage < stages; ++stage) {
    const Index a = 2 * stage * size, b = a + size;
    right.middleRows(stage * size, size) = complex_rows(keys.sums.middleRows(a, size)) -
                                           j * complex_rows(keys.sums.middleRows(b, size));
    old.middleRows(stage * size, size) = complex_rows(
        Books(codebook.book(group, static_cast<int>(stage), 0), size, 2 * g).cast<double>());
    for (Index other = 0; other < stages; ++other) {
      const Index c = 2 * other * size, d = c + size;
      normal.block(stage * size, other * size, size, size) =
          (keys.counts.block(a, c, size, size) + keys.counts.block(b, d, size, size))
              .cast<Complex>() +
          j * (keys.counts.block(a, d, size, size) - keys.counts.block(b, c, size, size))
                  .cast<Complex>();
    }
  }
  const Eigen::MatrixXcd rows = old + change_of(normal, right, old, ridge);
  for (Index stage = 0; stage < stages; ++stage) {
    Books book(codebook.book(group, static_cast<int>(stage), 0), size, 2 * g);
    book.leftCols(g) = rows.middleRows(stage * size, size).real().cast<float>();
    book.rightCols(g) = rows.middleRows(stage * size, size).imag().cast<float>();
  }
  codebook.derive_tied_books();
}

}  // namespace

std::vector<double> refine_key_codebook(KeyWork& keys, const KeyRefinement& refinement,
                                        KeyCodebook<float>& codebook,
                                        const std::function<void(int, double)>& done) {
  double error = keys.encode(codebook, refinement.beam_width, false);
  std::vector<double> objectives = {error};
  for (int round = 0; round < refinement.rounds; ++round) {
    for (int group = 0; group < codebook.config.num_groups(); ++group) {
      KeyCodebook<float> candidate = codebook;
      const auto solve = codebook.config.tied     ? solve_tied
                         : codebook.config.graded ? solve_graded
                                                  : solve_untied;
      solve(keys.occurrences(group), refinement.ridge, group, candidate);
      const double candidate_error = keys.error(candidate);
      if (!(candidate_error < error)) continue;
      codebook = std::move(candidate);
      error = candidate_error;
    }
    objectives.push_back(error);
    error = keys.encode(codebook, refinement.beam_width, true);
    objectives.push_back(error);
    done(round, error);
  }
  return objectives;
}

}  // namespace commvq
