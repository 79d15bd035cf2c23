#include "commvq/learner/query_statistics.hpp"

#include <algorithm>
#include <cmath>

namespace commvq {

QueryStatistics::QueryStatistics(const PairLayout& pairs, int num_kv_heads)
    : pairs_(pairs), num_kv_heads_(num_kv_heads) {
  pairs.validate();
  require(num_kv_heads >= 1, "num_kv_heads is ", num_kv_heads, "; it must be at least 1");
  sums_.resize(static_cast<std::size_t>(Index{num_kv_heads} * pairs.num_pairs()));
}

void QueryStatistics::add(MatrixView<const float> queries) {
  const Index num_q_heads = queries.cols / pairs_.head_dim;
  require(queries.cols > 0 && queries.cols % (Index{num_kv_heads_} * pairs_.head_dim) == 0,
          "queries have ", queries.cols,
          " channels; expected a multiple of num_kv_heads * head_dim ", "= ", num_kv_heads_, " * ",
          pairs_.head_dim);
  std::vector<double> sums = sums_;
  for (Index t = 0; t < queries.rows; ++t)
    for (Index head = 0; head < num_q_heads; ++head) {
      const float* const query = queries.row(t) + head * pairs_.head_dim;
      const Index kv_head = head / (num_q_heads / num_kv_heads_);
      double* const sum = &sums[static_cast<std::size_t>(kv_head * pairs_.num_pairs())];
      for (int pair = 0; pair < pairs_.num_pairs(); ++pair) {
        const double re = query[pairs_.real_channel(pair)], im = query[pairs_.imag_channel(pair)];
        sum[pair] += re * re + im * im;
      }
    }
  require(std::all_of(sums.begin(), sums.end(), [](double sum) { return std::isfinite(sum); }),
          "the queries hold NaN or infinity");
  sums_ = std::move(sums);
}

void QueryStatistics::add(const QueryStatistics& other) {
  require(other.pairs_ == pairs_ && other.num_kv_heads_ == num_kv_heads_,
          "statistics of ", other.num_kv_heads_, " heads of ", other.pairs_.head_dim,
          " cannot be added to those of ", num_kv_heads_, " heads of ", pairs_.head_dim,
          " or another order of channels");
  for (std::size_t i = 0; i < sums_.size(); ++i) sums_[i] += other.sums_[i];
}

std::vector<float> QueryStatistics::pair_weights() const {
  const int num_pairs = pairs_.num_pairs();
  std::vector<float> weights(sums_.size(), 1.0f);
  for (int head = 0; head < num_kv_heads_; ++head) {
    const double* const sums = &sums_[static_cast<std::size_t>(head) * num_pairs];
    double mean = 0;
    for (int pair = 0; pair < num_pairs; ++pair) mean += sums[pair] / num_pairs;
    if (mean == 0) continue;
    for (int pair = 0; pair < num_pairs; ++pair)
      weights[static_cast<std::size_t>(head * num_pairs + pair)] =
          std::max(kMinWeight, static_cast<float>(std::sqrt(sums[pair] / mean)));
  }
  return weights;
}

}  // namespace commvq
