#include "learner/graded_books.hpp"

#include <numeric>
#include <vector>

#include "learner/graded_directions.hpp"
#include "learner/moments.hpp"

namespace commvq::graded_books {
namespace {

Moments moments_of(KeyWork& keys, Index width) {
  return commvq::moments_of(keys.size(), width, [&](Index first, Index count) {
    std::vector<Index> chosen(static_cast<std::size_t>(count));
    std::iota(chosen.begin(), chosen.end(), first);
    return Eigen::MatrixXd(keys.residuals(chosen).cast<double>());
  });
}

}  // namespace

void initialize(KeyWork& keys, int group, KeyCodebook<float>& codebook) {
  const KeyCodecConfig& config = codebook.config;
  keys.begin_stage(codebook, group, 0);
  const Moments moments = moments_of(keys, codebook.row_size());
  Eigen::MatrixXd parameters(1 + config.num_stages, codebook.row_size());
  parameters << moments.mean, graded_directions(moments.covariance, config.num_stages);
  const Eigen::MatrixXd tie = tie_of(Eigen::VectorXd::Constant(2 * config.num_stages, 0.5));
  Eigen::Map<key_em::Matrix>(codebook.book(group, 0, 0), tie.rows(), parameters.cols()) =
      (tie * parameters).cast<float>();
}

Eigen::VectorXd shares_of(const Occurrences& keys) {
  Eigen::VectorXd shares(keys.counts.rows() / 2);
  for (Index book = 0; book < shares.size(); ++book) {
    const double off = keys.counts(2 * book, 2 * book),
                 on = keys.counts(2 * book + 1, 2 * book + 1);
    shares(book) = on / (off + on);
  }
  return shares;
}

Eigen::MatrixXd tie_of(const Eigen::VectorXd& shares) {
  Eigen::MatrixXd tie = Eigen::MatrixXd::Zero(2 * shares.size(), 1 + shares.size() / 2);
  tie.topLeftCorner(2, 1).setOnes();
  for (int book = 0; book < shares.size(); ++book) {
    const GradedBit bit = graded_bit(book);
    tie(2 * book, 1 + bit.number) = -shares(book) * bit.weight;
    tie(2 * book + 1, 1 + bit.number) = (1 - shares(book)) * bit.weight;
  }
  return tie;
}

Eigen::MatrixXd parameters_of(const KeyCodebook<float>& codebook, int group,
                              const Eigen::VectorXd& shares) {
  Eigen::MatrixXd result = Eigen::MatrixXd::Zero(1 + shares.size() / 2, codebook.row_size());
  for (int book = 0; book < shares.size(); ++book) {
    const Eigen::RowVectorXd off =
        Eigen::Map<const Eigen::RowVectorXf>(codebook.book(group, book / 2, book % 2),
                                             codebook.row_size())
            .cast<double>();
    const Eigen::RowVectorXd on =
        Eigen::Map<const Eigen::RowVectorXf>(
            codebook.book(group, book / 2, book % 2) + codebook.row_size(), codebook.row_size())
            .cast<double>();
    result.row(0) += off + shares(book) * (on - off);
    if (const GradedBit bit = graded_bit(book); bit.weight == 1)
      result.row(1 + bit.number) = on - off;
  }
  return result;
}

}  // namespace commvq::graded_books
