#include "learner/key_refinement.hpp"

#include <algorithm>
#include <complex>
#include <limits>
#include <utility>

#include "commvq/core/parallel_errors.hpp"
#include "commvq/key_codec/encoder.hpp"

#include <Eigen/Cholesky>

#include "core/parallel_product.hpp"

namespace commvq {
namespace {

using Complex = std::complex<double>;
using Codes = std::vector<std::uint16_t>;

/// Calls `use(first, keys)` for the keys `[count][head_dim]` of each batch, from `first` on.
template <class Use>
void for_each_batch(const KeySample& sample, int num_pairs, Index batch_tokens, Use use) {
  std::vector<float> batch(
      static_cast<std::size_t>(std::min(sample.size(), batch_tokens) * 2 * num_pairs));
  for (Index first = 0; first < sample.size(); first += batch_tokens) {
    const Index count = std::min(batch_tokens, sample.size() - first);
#pragma omp parallel for
    for (Index t = 0; t < count; ++t)
      sample.read(first + t, 1, 0, num_pairs, batch.data() + t * 2 * num_pairs);
    use(first, MatrixView<const float>(batch.data(), count, Index{2} * num_pairs));
  }
}

/// |key - decoded|^2 of every key, in double precision.
std::vector<double> squared_errors(MatrixView<const float> keys, const KeyCodebook<float>& codebook,
                                   const std::uint16_t* codes) {
  std::vector<double> errors(static_cast<std::size_t>(keys.rows));
  ParallelErrors thrown;
#pragma omp parallel
  {
    std::vector<float> decoded;
#pragma omp for
    for (Index t = 0; t < keys.rows; ++t)
      thrown.guard([&] {
        decoded.resize(static_cast<std::size_t>(keys.cols));
        decode_key(codebook, codes + t * codebook.config.num_codes(), decoded.data());
        double sum = 0;
        for (Index i = 0; i < keys.cols; ++i) {
          const double difference =
              static_cast<double>(keys(t, i)) - decoded[static_cast<std::size_t>(i)];
          sum += difference * difference;
        }
        errors[static_cast<std::size_t>(t)] = sum;
      });
  }
  thrown.rethrow();
  return errors;
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

  void solve(const KeySample& keys, const Codes& codes, Index batch_tokens, double ridge,
             KeyCodebook<float>& codebook) const {
    const Eigen::MatrixXcd old = current(codebook);
    if (config_.tied) {
      store(old + change<Complex>(keys, codes, batch_tokens, ridge, old), codebook);
    } else {
      store(old + change<double>(keys, codes, batch_tokens, ridge, old), codebook);
    }
  }

 private:
  /// Sums over the keys: the normal matrix N and the right side, whose columns are rows of U.
  template <class Scalar>
  struct Equations {
    Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic> normal;
    Eigen::MatrixXcd right;
  };

  /// The unknown that code number `k` of the group names.
  Index row_of(int k, std::uint16_t code) const {
    return Index{config_.tied ? k / 2 : k} * config_.codebook_size + code;
  }
  /// Whether the unknown that code number `k` names counts j times.
  bool times_j(int k) const { return config_.tied && k % 2 == 1; }

  /// Adds a batch of keys. `codes` are those of this group, `[count]` rows num_codes apart. Every
  /// thread adds to the rows of N of its own books, token by token: the sums do not depend on the
  /// threads.
  template <class Scalar>
  void add(MatrixView<const float> keys, const std::uint16_t* codes,
           Equations<Scalar>& equations) const {
    const int g = config_.group_pairs;
    Eigen::MatrixXcd columns(g, keys.rows);
    for (Index t = 0; t < keys.rows; ++t)
      for (int i = 0; i < g; ++i)
        columns(i, t) = Complex(keys(t, group_ * g + i), keys(t, keys.cols / 2 + group_ * g + i));
#pragma omp parallel for schedule(dynamic)
    for (int stage = 0; stage < config_.num_stages; ++stage)
      for (Index t = 0; t < keys.rows; ++t)
        for (int k = 2 * stage; k < 2 * stage + 2; ++k) {
          const std::uint16_t* const key_codes = codes + t * config_.num_codes();
          const Index row = row_of(k, key_codes[k]);
          if (times_j(k)) {
            equations.right.col(row) += Complex(0, -1) * columns.col(t);
          } else {
            equations.right.col(row) += columns.col(t);
          }
          for (int other = 0; other < 2 * config_.num_stages; ++other)
            equations.normal(row, row_of(other, key_codes[other])) +=
                product<Scalar>(times_j(k), times_j(other));
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
  Eigen::MatrixXcd change(const KeySample& keys, const Codes& codes, Index batch_tokens,
                          double ridge, const Eigen::MatrixXcd& old) const {
    using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic>;
    Equations<Scalar> equations = {Matrix::Zero(num_rows_, num_rows_),
                                   Eigen::MatrixXcd::Zero(config_.group_pairs, num_rows_)};
    for_each_batch(keys, config_.pairs.num_pairs(), batch_tokens,
                   [&](Index first, MatrixView<const float> batch) {
                     const Index first_code = Index{2} * group_ * config_.num_stages;
                     add(batch, codes.data() + first * config_.num_codes() + first_code, equations);
                   });
    auto& [normal, right] = equations;
    const double lambda = ridge * normal.diagonal().real().mean();
    Eigen::MatrixXcd target(old.rows(), old.cols());
    detail::parallel_product(normal.template cast<Complex>().eval(), old, target);
    target = right.transpose() - target;
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

std::vector<double> refine_key_codebook(const KeySample& keys, const KeyRefinement& refinement,
                                        Index batch_tokens, KeyCodebook<float>& codebook,
                                        Codes& codes,
                                        const std::function<void(int, double)>& done) {
  const Index num_codes = codebook.config.num_codes();
  const int num_pairs = codebook.config.pairs.num_pairs();
  const auto codes_at = [&](Index token) { return codes.data() + token * num_codes; };
  const auto error_of = [&](const KeyCodebook<float>& decoder) {
    double sum = 0;
    for_each_batch(keys, num_pairs, batch_tokens, [&](Index first, MatrixView<const float> batch) {
      for (const double error : squared_errors(batch, decoder, codes_at(first))) sum += error;
    });
    return sum / static_cast<double>(keys.size());
  };
  // Codes anew; `keep` says whether a key's old ones remain where they are better.
  const auto encode = [&](bool keep) {
    const KeyEncoder<float> encoder(codebook);
    Codes new_codes;
    double sum = 0;
    for_each_batch(keys, num_pairs, batch_tokens, [&](Index first, MatrixView<const float> batch) {
      new_codes.resize(static_cast<std::size_t>(batch.rows * num_codes));
      encoder.encode(batch, refinement.beam_width, as_matrix(new_codes, batch.rows, num_codes));
      const std::vector<double> new_errors = squared_errors(batch, codebook, new_codes.data());
      const std::vector<double> errors =
          keep ? squared_errors(batch, codebook, codes_at(first))
               : std::vector<double>(new_errors.size(), std::numeric_limits<double>::infinity());
      for (Index t = 0; t < batch.rows; ++t) {
        const auto at = static_cast<std::size_t>(t);
        sum += std::min(errors[at], new_errors[at]);
        if (new_errors[at] < errors[at])
          std::copy_n(new_codes.data() + t * num_codes, num_codes, codes_at(first + t));
      }
    });
    return sum / static_cast<double>(keys.size());
  };

  double error = encode(false);
  std::vector<double> objectives = {error};
  for (int round = 0; round < refinement.rounds; ++round) {
    for (int group = 0; group < codebook.config.num_groups(); ++group) {
      KeyCodebook<float> candidate = codebook;
      JointLeastSquares(codebook.config, group)
          .solve(keys, codes, batch_tokens, refinement.ridge, candidate);
      const double candidate_error = error_of(candidate);
      if (!(candidate_error < error)) continue;
      codebook = std::move(candidate);
      error = candidate_error;
    }
    objectives.push_back(error);
    error = encode(true);
    objectives.push_back(error);
    done(round, error);
  }
  return objectives;
}

}  // namespace commvq
