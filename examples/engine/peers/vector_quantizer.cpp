#include "engine/peers/vector_quantizer.hpp"

#include <algorithm>

#include <omp.h>

namespace engine {
namespace {

using Strided = Eigen::Map<const Points, 0, Eigen::OuterStride<>>;

/// Sub-vector number `part` of every row.
Points part_of(MatrixView<const float> rows, Index part, Index width) {
  return Strided(rows.data + part * width, rows.rows, width, Eigen::OuterStride<>(rows.row_stride));
}

/// At most `count` of the rows, evenly spread.
Points spread_over(MatrixView<const float> rows, Index count) {
  Points chosen(std::min(count, rows.rows), rows.cols);
  for (Index i = 0; i < chosen.rows(); ++i)
    std::copy_n(rows.row(i * rows.rows / chosen.rows()), rows.cols, chosen.row(i).data());
  return chosen;
}

void subtract(const Points& codebook, const std::vector<std::uint16_t>& codes, Points& residuals) {
  for (Index t = 0; t < residuals.rows(); ++t)
    residuals.row(t) -= codebook.row(codes[static_cast<std::size_t>(t)]);
}

}  // namespace

VectorQuantizer::VectorQuantizer(MatrixView<const float> rows,
                                 const VectorQuantizerOptions& options)
    : shape_(options.shape) {
  commvq::require(shape_.width >= 1 && rows.cols % shape_.width == 0, "sub-vectors of ",
                  shape_.width, " channels do not divide ", rows.cols, " channels");
  commvq::require(shape_.stages >= 1, "a vector quantiser has ", shape_.stages,
                  " stages; it must have at least 1");
  commvq::require(rows.rows > 0, "there are no tokens to learn a vector quantiser from");
  const Points sample = spread_over(rows, options.max_tokens);
  const Index num_parts = rows.cols / shape_.width;
  codebooks_.resize(static_cast<std::size_t>(num_parts * shape_.stages));
#pragma omp parallel for schedule(dynamic) if (num_parts >= omp_get_max_threads())
  for (Index part = 0; part < num_parts; ++part) {
    std::mt19937_64 random(options.seed * 1000003 + static_cast<std::uint64_t>(part));
    Points residuals = part_of({sample.data(), sample.rows(), sample.cols()}, part, shape_.width);
    for (int stage = 0; stage < shape_.stages; ++stage) {
      Points& learnt = codebooks_[static_cast<std::size_t>(part * shape_.stages + stage)];
      learnt = kmeans(residuals, kCodebookSize, options.iterations, random);
      subtract(learnt, nearest(residuals, learnt), residuals);
    }
  }
}

PeerCodes VectorQuantizer::encode(MatrixView<const float> rows) const {
  PeerCodes result;
  result.codes.resize(static_cast<std::size_t>(rows.rows) * codebooks_.size());
  for (Index part = 0; part < num_parts(); ++part) {
    Points residuals = part_of(rows, part, shape_.width);
    for (int stage = 0; stage < shape_.stages; ++stage) {
      const std::vector<std::uint16_t> codes = nearest(residuals, codebook(part, stage));
      subtract(codebook(part, stage), codes, residuals);
      for (std::size_t t = 0; t < codes.size(); ++t)
        result
            .codes[t * codebooks_.size() + static_cast<std::size_t>(part * shape_.stages + stage)] =
            codes[t];
    }
  }
  return result;
}

void VectorQuantizer::decode(const PeerCodes& codes, MatrixView<float> rows) const {
  auto code = codes.codes.begin();
  for (Index t = 0; t < rows.rows; ++t)
    for (Index part = 0; part < num_parts(); ++part) {
      Eigen::Map<Eigen::RowVectorXf> sum(rows.row(t) + part * shape_.width, shape_.width);
      sum.setZero();
      for (int stage = 0; stage < shape_.stages; ++stage) sum += codebook(part, stage).row(*code++);
    }
}

}  // namespace engine
