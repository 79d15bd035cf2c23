#include "learner/key_em.hpp"

#include <algorithm>
#include <complex>
#include <vector>

#include "commvq/core/parallel_errors.hpp"

#include <Eigen/Cholesky>

namespace commvq::key_em {
namespace {

/// Tokens of one unit of parallel work.
constexpr Index kChunkTokens = 256;
/// Relative weight below which an assignment is left out: e^-18 = 1.5e-8, below float's epsilon.
constexpr float kNegligibleLog = 18.0f;
/// Beyond it an assignment is hard, and infinity times a difference of zero would be NaN.
constexpr double kMaxInverseTemperature = 1e30;
/// The pull to the old books, relative to the mean weight of a centroid.
constexpr double kRidge = 1e-6;

/// The parts of -|x - Z_0[A] - Z_1[B]|^2 = -|x|^2 + a[A] + b[B] - cross[A][B] that all x share.
struct Geometry {
  explicit Geometry(const Matrix& books_)
      : books(books_), size(books_.rows() / 2), squared_norms(books_.rowwise().squaredNorm()) {
    cross.noalias() = 2.0f * books.topRows(size) * books.bottomRows(size).transpose();
  }
  /// `[tokens][2 Nc]`: a[A], then b[B], for each residual.
  template <class Rows>
  Matrix parts(const Rows& residuals) const {
    Matrix result(residuals.rows(), 2 * size);
    result.noalias() = 2.0f * residuals * books.transpose();
    result.rowwise() -= squared_norms.transpose();
    return result;
  }

  const Matrix& books;
  Index size;
  Eigen::VectorXf squared_norms;
  Matrix cross;
};

/// Writes the largest score of each A, over all B, and returns the largest of all.
float row_maxima(const Geometry& geometry, const float* parts, float* maxima) {
  const Index size = geometry.size;
  const float* const part_b = parts + size;
  float largest = -std::numeric_limits<float>::infinity();
  for (Index a = 0; a < size; ++a) {
    const float* const cross = geometry.cross.row(a).data();
    float row = part_b[0] - cross[0];
#pragma omp simd reduction(max : row)
    for (Index b = 0; b < size; ++b) row = std::max(row, part_b[b] - cross[b]);
    maxima[a] = parts[a] + row;
    largest = std::max(largest, maxima[a]);
  }
  return largest;
}

struct ChunkStatistics {
  double squared_error = 0;
  Matrix pair_weights;
  Matrix sums;
};

/// Adds p(A, B | x) of one residual to `pair_weights`; its margins replace `parts`.
void assign_one(const Geometry& geometry, float* parts, const float* maxima, float largest,
                float inverse_temperature, Matrix& pair_weights, Matrix& rows) {
  const Index size = geometry.size;
  const float* const part_b = parts + size;
  const float floor = largest - kNegligibleLog / inverse_temperature;
  float total = 0;
  for (Index a = 0; a < size; ++a) {
    if (maxima[a] < floor) continue;
    auto row = rows.row(a).array();
    // Added up as in `row_maxima`, so that no score exceeds the largest, however cold it is.
    row = (((Eigen::Map<const Eigen::RowVectorXf>(part_b, size) - geometry.cross.row(a)).array() +
            parts[a] - largest) *
           inverse_temperature)
              .exp();
    total += row.sum();
  }
  Eigen::Map<Eigen::RowVectorXf> margin_b(parts + size, size);
  margin_b.setZero();
  for (Index a = 0; a < size; ++a) {
    parts[a] = 0;
    if (maxima[a] < floor) continue;
    auto row = rows.row(a);
    row /= total;
    parts[a] = row.sum();
    margin_b += row;
    pair_weights.row(a) += row;
  }
}

ChunkStatistics assign_chunk(const Geometry& geometry, const Matrix& residuals,
                             double temperature) {
  const Index size = geometry.size;
  ChunkStatistics result;
  result.pair_weights = Matrix::Zero(size, size);
  Matrix margins = geometry.parts(residuals);
  Matrix rows(size, size);
  std::vector<float> maxima(static_cast<std::size_t>(size));
  for (Index t = 0; t < residuals.rows(); ++t) {
    float* const parts = margins.row(t).data();
    const float largest = row_maxima(geometry, parts, maxima.data());
    result.squared_error += std::max(0.0f, residuals.row(t).squaredNorm() - largest);
    assign_one(geometry, parts, maxima.data(), largest,
               static_cast<float>(std::min(1 / temperature, kMaxInverseTemperature)),
               result.pair_weights, rows);
  }
  result.sums.noalias() = margins.transpose() * residuals;
  return result;
}

/// Rows of chunk `chunk`.
Matrix read_chunk(const Residuals& residuals, Index chunk) {
  const Index first = chunk * kChunkTokens;
  Matrix rows(std::min(kChunkTokens, residuals.size - first), residuals.width);
  residuals.read(first, rows);
  return rows;
}

Index num_chunks_of(const Residuals& residuals) {
  return (residuals.size + kChunkTokens - 1) / kChunkTokens;
}

/// Writes the codes of the nearest centres of some residuals, rows `[2]` codes_stride apart.
void find_nearest_of(const Geometry& geometry, const Matrix& residuals, std::uint16_t* code,
                     Index codes_stride) {
  const Matrix parts = geometry.parts(residuals);
  Eigen::VectorXf maxima(geometry.size);
  for (Index t = 0; t < parts.rows(); ++t, code += codes_stride) {
    row_maxima(geometry, parts.row(t).data(), maxima.data());
    Index a = 0, b = 0;
    maxima.maxCoeff(&a);
    (parts.row(t).tail(geometry.size) - geometry.cross.row(a)).maxCoeff(&b);
    code[0] = static_cast<std::uint16_t>(a);
    code[1] = static_cast<std::uint16_t>(b);
  }
}

/// Z from (diag(n_A + n_B) + j (W - W^T)) Z = S_A - j S_B, the stationary point in complex form.
Matrix solve_tied(const Statistics& statistics, const Matrix& books) {
  using Complex = std::complex<double>;
  const Index size = books.rows() / 2, g = books.cols() / 2;
  const Eigen::MatrixXd& w = statistics.pair_weights;
  const Complex j(0, 1);
  Eigen::MatrixXcd system = j * (w - w.transpose()).cast<Complex>();
  const Eigen::VectorXd weights = w.rowwise().sum() + w.colwise().sum().transpose();
  const double ridge = kRidge * weights.mean();
  system.diagonal() += (weights.array() + ridge).matrix().cast<Complex>();

  const auto complex_rows = [g](const auto& planar) -> Eigen::MatrixXcd {
    return planar.leftCols(g).template cast<Complex>() +
           Complex(0, 1) * planar.rightCols(g).template cast<Complex>();
  };
  const Eigen::MatrixXcd right = complex_rows(statistics.sums.topRows(size)) -
                                 j * complex_rows(statistics.sums.bottomRows(size)) +
                                 ridge * complex_rows(books.topRows(size));
  const Eigen::MatrixXcd solution = system.llt().solve(right);
  Matrix result(books.rows(), books.cols());
  result.topLeftCorner(size, g) = solution.real().cast<float>();
  result.topRightCorner(size, g) = solution.imag().cast<float>();
  tie(result);
  return result;
}

/// Both books from [diag(n_A), W; W^T, diag(n_B)] [Z_0; Z_1] = [S_A; S_B].
Matrix solve_untied(const Statistics& statistics, const Matrix& books) {
  const Index size = books.rows() / 2;
  const Eigen::MatrixXd& w = statistics.pair_weights;
  Eigen::MatrixXd system = Eigen::MatrixXd::Zero(2 * size, 2 * size);
  system.topRightCorner(size, size) = w;
  system.bottomLeftCorner(size, size) = w.transpose();
  system.diagonal().head(size) = w.rowwise().sum();
  system.diagonal().tail(size) = w.colwise().sum().transpose();
  const double ridge = kRidge * system.diagonal().mean();
  system.diagonal().array() += ridge;
  const Eigen::MatrixXd right = statistics.sums + ridge * books.cast<double>();
  return system.llt().solve(right).cast<float>();
}

}  // namespace

Statistics soft_assign(const Residuals& residuals, const Matrix& books, double temperature,
                       Index batch_tokens) {
  const Geometry geometry(books);
  Statistics result;
  result.pair_weights = Eigen::MatrixXd::Zero(geometry.size, geometry.size);
  result.sums = Eigen::MatrixXd::Zero(books.rows(), books.cols());
  const Index num_chunks = num_chunks_of(residuals);
  const Index batch_chunks = std::max<Index>(1, batch_tokens / kChunkTokens);
  for (Index first = 0; first < num_chunks; first += batch_chunks) {
    const Index count = std::min(batch_chunks, num_chunks - first);
    std::vector<ChunkStatistics> chunks(static_cast<std::size_t>(count));
    ParallelErrors errors;
#pragma omp parallel for schedule(dynamic)
    for (Index i = 0; i < count; ++i)
      errors.guard([&] {
        chunks[static_cast<std::size_t>(i)] =
            assign_chunk(geometry, read_chunk(residuals, first + i), temperature);
      });
    errors.rethrow();
    for (const ChunkStatistics& chunk : chunks) {
      result.squared_error += chunk.squared_error;
      result.pair_weights += chunk.pair_weights.cast<double>();
      result.sums += chunk.sums.cast<double>();
    }
  }
  return result;
}

Matrix solve_books(const Statistics& statistics, const Matrix& books, bool tied) {
  return tied ? solve_tied(statistics, books) : solve_untied(statistics, books);
}

void find_nearest(const Residuals& residuals, const Matrix& books, std::uint16_t* codes,
                  Index codes_stride) {
  const Geometry geometry(books);
  const Index num_chunks = num_chunks_of(residuals);
  ParallelErrors errors;
#pragma omp parallel for schedule(dynamic)
  for (Index chunk = 0; chunk < num_chunks; ++chunk)
    errors.guard([&] {
      find_nearest_of(geometry, read_chunk(residuals, chunk),
                      codes + chunk * kChunkTokens * codes_stride, codes_stride);
    });
  errors.rethrow();
}

void tie(Matrix& books) {
  const Index size = books.rows() / 2, g = books.cols() / 2;
  books.bottomLeftCorner(size, g) = -books.topRightCorner(size, g);
  books.bottomRightCorner(size, g) = books.topLeftCorner(size, g);
}

}  // namespace commvq::key_em
