#include "learner/key_refinement.hpp"

#include <algorithm>
#include <complex>
#include <numeric>
#include <utility>

#include "commvq/key_codec/encoder.hpp"

#include <Eigen/Cholesky>

namespace commvq {
namespace {

using Complex = std::complex<double>;
using Codes = std::vector<std::uint16_t>;

/// |key - decoded|^2 of every key, in double precision.
std::vector<double> squared_errors(MatrixView<const float> keys, const KeyCodebook<float>& codebook,
                                   const Codes& codes) {
  const Index num_codes = codebook.config.num_codes();
  std::vector<double> errors(static_cast<std::size_t>(keys.rows));
#pragma omp parallel
  {
    std::vector<float> decoded(static_cast<std::size_t>(keys.cols));
#pragma omp for
    for (Index t = 0; t < keys.rows; ++t) {
      decode_key(codebook, &codes[static_cast<std::size_t>(t * num_codes)], decoded.data());
      double sum = 0;
      for (Index i = 0; i < keys.cols; ++i) {
        const double difference = static_cast<double>(keys(t, i)) - decoded[i];
        sum += difference * difference;
      }
      errors[static_cast<std::size_t>(t)] = sum;
    }
  }
  return errors;
}

double mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

/// The least squares of one group: find the rows U that minimise the sum over keys of
/// |x - sum_k weight_k U[row_k]|^2, where the codes of a key name its rows. Untied books have
/// 2 R Nc rows of real numbers and weights 1. Tied books have R Nc rows of complex numbers and
/// weights 1 (book A) and j (book B).
class JointLeastSquares {
 public:
  JointLeastSquares(const KeyCodecConfig& config, int group)
      : config_(config), group_(group), num_rows_(Index{config.num_stages} * config.codebook_size) {
    if (!config.tied) num_rows_ *= 2;
  }

  void solve(MatrixView<const float> keys, const Codes& codes, double ridge,
             KeyCodebook<float>& codebook) const {
    const Eigen::MatrixXcd old = current(codebook);
    if (config_.tied) {
      store(old + change<Complex>(keys, codes, ridge, old), codebook);
    } else {
      store(old + change<double>(keys, codes, ridge, old).template cast<Complex>(), codebook);
    }
  }

 private:
  struct Term {
    Index row;
    bool times_j;
  };

  void terms_of(const std::uint16_t* codes, std::vector<Term>& terms) const {
    terms.clear();
    const std::uint16_t* code = codes + Index{2} * group_ * config_.num_stages;
    for (Index stage = 0; stage < config_.num_stages; ++stage)
      for (int which = 0; which < 2; ++which) {
        const Index book = config_.tied ? stage : 2 * stage + which;
        terms.push_back({book * config_.codebook_size + *code++, config_.tied && which == 1});
      }
  }

  /// Row `row` of the unknowns as complex numbers `[num_rows][g]`; for real unknowns the complex
  /// form is only a way to carry both halves of the planar row.
  Eigen::MatrixXcd current(const KeyCodebook<float>& codebook) const {
    const int g = config_.group_pairs;
    Eigen::MatrixXcd rows(num_rows_, g);
    for (Index row = 0; row < num_rows_; ++row) {
      const float* const planar = row_in(codebook, row);
      for (int i = 0; i < g; ++i) rows(row, i) = Complex(planar[i], planar[i + g]);
    }
    return rows;
  }
  void store(const Eigen::MatrixXcd& rows, KeyCodebook<float>& codebook) const {
    const int g = config_.group_pairs;
    for (Index row = 0; row < num_rows_; ++row) {
      auto* const planar = const_cast<float*>(row_in(codebook, row));
      for (int i = 0; i < g; ++i) {
        planar[i] = static_cast<float>(rows(row, i).real());
        planar[i + g] = static_cast<float>(rows(row, i).imag());
      }
    }
    if (config_.tied) codebook.derive_tied_books();
  }
  const float* row_in(const KeyCodebook<float>& codebook, Index row) const {
    const auto book = static_cast<int>(row / config_.codebook_size);
    const Index centroid = row % config_.codebook_size;
    const int stage = config_.tied ? book : book / 2;
    return codebook.book(group_, stage, config_.tied ? 0 : book % 2) +
           centroid * codebook.row_size();
  }

  /// The change of the rows: (N + lambda I) change = right side - N old, with N the normal matrix
  /// and lambda = ridge * mean diagonal: the proximal term lambda |U - old|^2. One Cholesky
  /// factorisation serves all pairs.
  template <class Scalar>
  Eigen::MatrixXcd change(MatrixView<const float> keys, const Codes& codes, double ridge,
                          const Eigen::MatrixXcd& old) const {
    using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic>;
    const int g = config_.group_pairs;
    const Index num_pairs = keys.cols / 2;
    Matrix normal = Matrix::Zero(num_rows_, num_rows_);
    Eigen::MatrixXcd right = Eigen::MatrixXcd::Zero(g, num_rows_);  // columns are rows of U
    std::vector<Term> terms;
    Eigen::VectorXcd key(g);
    for (Index t = 0; t < keys.rows; ++t) {
      terms_of(&codes[static_cast<std::size_t>(t * config_.num_codes())], terms);
      for (int i = 0; i < g; ++i)
        key[i] = Complex(keys(t, group_ * g + i), keys(t, num_pairs + group_ * g + i));
      for (const Term& left : terms) {
        right.col(left.row) += left.times_j ? Complex(0, -1) * key : key;
        for (const Term& other : terms)
          normal(left.row, other.row) += product<Scalar>(left.times_j, other.times_j);
      }
    }
    const double lambda = ridge * normal.diagonal().real().mean();
    const Eigen::MatrixXcd target = right.transpose() - normal.template cast<Complex>() * old;
    normal.diagonal().array() += Scalar(lambda);
    const Eigen::LLT<Eigen::Ref<Matrix>> cholesky(normal);  // in place
    if constexpr (std::is_same_v<Scalar, Complex>) {
      return cholesky.solve(target);
    } else {
      Eigen::MatrixXcd result(target.rows(), target.cols());
      result.real() = cholesky.solve(target.real());
      result.imag() = cholesky.solve(target.imag());
      return result;
    }
  }

  /// conj(weight of the left term) * weight of the right one.
  template <class Scalar>
  static Scalar product(bool left_times_j, bool right_times_j) {
    if constexpr (std::is_same_v<Scalar, Complex>) {
      if (left_times_j == right_times_j) return 1.0;
      return left_times_j ? Complex(0, -1) : Complex(0, 1);
    } else {
      return 1.0;
    }
  }

  KeyCodecConfig config_;
  int group_;
  Index num_rows_;
};

}  // namespace

std::vector<double> refine_key_codebook(MatrixView<const float> keys,
                                        const KeyRefinement& refinement,
                                        KeyCodebook<float>& codebook,
                                        const std::function<void(int, double)>& done) {
  const Index num_codes = codebook.config.num_codes();
  Codes codes(static_cast<std::size_t>(keys.rows * num_codes));
  KeyEncoder<float>(codebook).encode(keys, refinement.beam_width,
                                     as_matrix(codes, keys.rows, num_codes));
  std::vector<double> errors = squared_errors(keys, codebook, codes);
  std::vector<double> objectives = {mean(errors)};
  for (int round = 0; round < refinement.rounds; ++round) {
    for (int group = 0; group < codebook.config.num_groups(); ++group) {
      KeyCodebook<float> candidate = codebook;
      JointLeastSquares(codebook.config, group).solve(keys, codes, refinement.ridge, candidate);
      std::vector<double> candidate_errors = squared_errors(keys, candidate, codes);
      if (!(mean(candidate_errors) < mean(errors))) continue;
      codebook = std::move(candidate);
      errors = std::move(candidate_errors);
    }
    objectives.push_back(mean(errors));

    Codes new_codes(codes.size());
    KeyEncoder<float>(codebook).encode(keys, refinement.beam_width,
                                       as_matrix(new_codes, keys.rows, num_codes));
    const std::vector<double> new_errors = squared_errors(keys, codebook, new_codes);
    for (Index t = 0; t < keys.rows; ++t) {
      const auto i = static_cast<std::size_t>(t);
      if (!(new_errors[i] < errors[i])) continue;
      errors[i] = new_errors[i];
      std::copy_n(&new_codes[static_cast<std::size_t>(t * num_codes)], num_codes,
                  &codes[static_cast<std::size_t>(t * num_codes)]);
    }
    objectives.push_back(mean(errors));
    done(round, objectives.back());
  }
  return objectives;
}

}  // namespace commvq
