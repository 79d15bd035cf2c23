#include "learner/host_key_work.hpp"

#include <algorithm>
#include <limits>

#include "commvq/core/parallel_errors.hpp"
#include "commvq/key_codec/encoder.hpp"

namespace commvq {
namespace {

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

}  // namespace

HostKeyWork::HostKeyWork(const KeySample& keys, const KeyCodecConfig& config, Index batch_tokens)
    : keys_(keys),
      config_(config),
      batch_tokens_(batch_tokens),
      codes_(static_cast<std::size_t>(keys.size() * config.num_codes())) {}

void HostKeyWork::begin_stage(const KeyCodebook<float>& codebook, int group, int stage) {
  const int g = config_.group_pairs;
  const Index first_of_group = Index{2} * group * config_.num_stages;
  first_code_ = first_of_group + Index{2} * stage;
  residuals_ = {size(), Index{2} * g, [=, this, &codebook](Index first, Matrix& rows) {
                  keys_.read(first, rows.rows(), group * g, g, rows.data());
                  for (Index t = 0; t < rows.rows(); ++t) {
                    const std::uint16_t* code = codes_at(first + t) + first_of_group;
                    for (int s = 0; s < stage; ++s, code += 2) {
                      using Row = Eigen::Map<const Eigen::RowVectorXf>;
                      rows.row(t) -= Row(codebook.book(group, s, 0) + code[0] * 2 * g, 2 * g) +
                                     Row(codebook.book(group, s, 1) + code[1] * 2 * g, 2 * g);
                    }
                  }
                }};
}

KeyWork::Matrix HostKeyWork::residuals(const std::vector<Index>& keys) {
  Matrix result(static_cast<Index>(keys.size()), residuals_.width), one(1, residuals_.width);
  for (Index i = 0; i < result.rows(); ++i) {
    residuals_.read(keys[static_cast<std::size_t>(i)], one);
    result.row(i) = one;
  }
  return result;
}

key_em::Statistics HostKeyWork::soft_assign(const Matrix& books, double temperature) {
  return key_em::soft_assign(residuals_, books, temperature, batch_tokens_);
}

void HostKeyWork::assign(const Matrix& books) {
  key_em::find_nearest(residuals_, books, codes_.data() + first_code_, config_.num_codes());
}

/// Calls `use(first, keys)` for the keys `[count][head_dim]` of each batch, from `first` on.
template <class Use>
void HostKeyWork::for_each_batch(Use use) const {
  const int num_pairs = config_.pairs.num_pairs();
  std::vector<float> batch(static_cast<std::size_t>(std::min(size(), batch_tokens_) * 2 * num_pairs));
  for (Index first = 0; first < size(); first += batch_tokens_) {
    const Index count = std::min(batch_tokens_, size() - first);
#pragma omp parallel for
    for (Index t = 0; t < count; ++t)
      keys_.read(first + t, 1, 0, num_pairs, batch.data() + t * 2 * num_pairs);
    use(first, MatrixView<const float>(batch.data(), count, Index{2} * num_pairs));
  }
}

double HostKeyWork::encode(const KeyCodebook<float>& codebook, int beam_width, bool keep) {
  const KeyEncoder<float> encoder(codebook);
  const Index num_codes = config_.num_codes();
  std::vector<std::uint16_t> new_codes;
  double sum = 0;
  for_each_batch([&](Index first, MatrixView<const float> batch) {
    new_codes.resize(static_cast<std::size_t>(batch.rows * num_codes));
    encoder.encode(batch, beam_width, as_matrix(new_codes, batch.rows, num_codes));
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
  return sum / static_cast<double>(size());
}

double HostKeyWork::error(const KeyCodebook<float>& codebook) {
  double sum = 0;
  for_each_batch([&](Index first, MatrixView<const float> batch) {
    for (const double error : squared_errors(batch, codebook, codes_at(first))) sum += error;
  });
  return sum / static_cast<double>(size());
}

Occurrences HostKeyWork::occurrences(int group) {
  const Index rows = Index{2} * config_.num_stages * config_.codebook_size;
  Occurrences result{Eigen::MatrixXd::Zero(rows, rows),
                     Eigen::MatrixXd::Zero(rows, Index{2} * config_.group_pairs)};
  for_each_batch([&](Index first, MatrixView<const float> batch) {
    add_occurrences(batch, codes_at(first), group, result);
  });
  return result;
}

/// Every thread adds to the columns of its own books, token by token: the sums do not depend on the
/// threads.
void HostKeyWork::add_occurrences(MatrixView<const float> keys, const std::uint16_t* codes,
                                  int group, Occurrences& sum) const {
  const int g = config_.group_pairs, num_books = 2 * config_.num_stages;
  const Index size = config_.codebook_size;
  Eigen::MatrixXd columns(2 * g, keys.rows);  // this group's half of the planes
  for (Index t = 0; t < keys.rows; ++t)
    for (int i = 0; i < g; ++i) {
      columns(i, t) = static_cast<double>(keys(t, group * g + i));
      columns(g + i, t) = static_cast<double>(keys(t, keys.cols / 2 + group * g + i));
    }
  ParallelErrors thrown;
#pragma omp parallel for schedule(dynamic)
  for (int book = 0; book < num_books; ++book)
    thrown.guard([&] {
      Eigen::MatrixXd own = Eigen::MatrixXd::Zero(2 * g, size);  // columns are side by side
      for (Index t = 0; t < keys.rows; ++t) {
        const std::uint16_t* const code = codes + t * config_.num_codes() + group * num_books;
        own.col(code[book]) += columns.col(t);
        const Index column = book * size + code[book];
        for (int other = 0; other < num_books; ++other)
          sum.counts(other * size + code[other], column) += 1;
      }
      sum.sums.middleRows(book * size, size) += own.transpose();
    });
  thrown.rethrow();
}

}  // namespace commvq
