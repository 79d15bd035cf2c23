#include "learner/key_sample.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <unordered_map>

#include "commvq/core/float16.hpp"

namespace commvq {
namespace {

/// The norm that `KeyCodec` would store for a token: over the head or over all heads.
float stored_norm(const float* key, Index first, Index count) {
  double sum = 0;
  for (Index i = first; i < first + count; ++i) sum += static_cast<double>(key[i]) * key[i];
  return from_bf16(to_bf16(static_cast<float>(std::sqrt(sum))));
}

/// Calls `use(token, norm)` for the tokens with a norm to divide by, in their order. The norms of a
/// batch are in memory at once.
template <class Use>
void for_each_norm(MatrixView<const float> keys, int head, const KeyLearnerOptions& options,
                   Use use) {
  const KeyCodecConfig& codec = options.codec;
  const int head_dim = codec.pairs.head_dim;
  const Index first_channel = codec.norm_per_head ? Index{head} * head_dim : 0;
  const Index num_channels = codec.norm_per_head ? head_dim : keys.cols;
  std::vector<float> norms(
      static_cast<std::size_t>(std::min<Index>(keys.rows, options.batch_tokens)));
  const auto batch = static_cast<Index>(norms.size());
  for (Index first = 0; first < keys.rows; first += batch) {
    const Index count = std::min(batch, keys.rows - first);
#pragma omp parallel for
    for (Index t = 0; t < count; ++t)
      norms[static_cast<std::size_t>(t)] =
          stored_norm(keys.row(first + t), first_channel, num_channels);
    for (Index t = 0; t < count; ++t) {
      const float norm = norms[static_cast<std::size_t>(t)];
      require(std::isfinite(norm), "key of token ", first + t,
              " has a norm beyond bf16's range, 3.39e38; scale the keys down");
      if (norm > 0) use(first + t, norm);
    }
  }
}

}  // namespace

std::vector<Index> choose(Index size, Index count, std::mt19937_64& random) {
  // The first steps of a shuffle of all indices, of which only those that moved are kept.
  std::unordered_map<Index, Index> moved;
  const auto at = [&](Index i) {
    const auto found = moved.find(i);
    return found == moved.end() ? i : found->second;
  };
  std::vector<Index> chosen(static_cast<std::size_t>(std::min(count, size)));
  for (Index i = 0; i < static_cast<Index>(chosen.size()); ++i) {
    const auto other = i + static_cast<Index>(random() % static_cast<std::uint64_t>(size - i));
    chosen[static_cast<std::size_t>(i)] = at(other);
    moved[other] = at(i);
    moved.erase(i);
  }
  return chosen;
}

KeySample::KeySample(MatrixView<const float> keys, const KeyLearnerOptions& options)
    : keys_(keys),
      channels_(static_cast<std::size_t>(keys.cols)),
      weights_(options.pair_weights.empty()
                   ? std::vector<float>(static_cast<std::size_t>(keys.cols / 2), 1.0f)
                   : options.pair_weights) {
  std::iota(channels_.begin(), channels_.end(), 0);
}

KeySample::KeySample(MatrixView<const float> keys, const KeyLearnerOptions& options,
                     std::mt19937_64& random)
    : KeySample(keys, options) {
  tokens_ = choose(keys.rows, options.max_tokens, random);
}

KeySample::KeySample(MatrixView<const float> keys, int head, const KeyLearnerOptions& options,
                     std::mt19937_64& random)
    : KeySample(keys.middle_cols(Index{head} * options.codec.pairs.head_dim,
                                 options.codec.pairs.head_dim),
                options) {
  const std::vector<int> in_order = channels_;
  options.codec.pairs.to_planar(in_order.data(), channels_.data());

  Index num_used = 0;
  for_each_norm(keys, head, options, [&](Index, float) { ++num_used; });
  const std::vector<Index> ranks = choose(std::max<Index>(1, num_used), options.max_tokens, random);
  tokens_.resize(ranks.size());
  norms_.assign(ranks.size(), std::numeric_limits<float>::infinity());  // turns a key to zeros

  std::vector<std::size_t> by_rank(ranks.size());
  std::iota(by_rank.begin(), by_rank.end(), std::size_t{0});
  std::sort(by_rank.begin(), by_rank.end(),
            [&](std::size_t a, std::size_t b) { return ranks[a] < ranks[b]; });
  auto next = by_rank.begin();
  Index rank = 0;
  for_each_norm(keys, head, options, [&](Index token, float norm) {
    if (next == by_rank.end() || ranks[*next] != rank++) return;
    tokens_[*next] = token;
    norms_[*next++] = norm;
  });
}

void KeySample::read(Index first, Index count, int first_pair, int num_pairs, float* planar) const {
  const float* const weights = weights_.data() + first_pair;
  const int* const halves[] = {channels_.data() + first_pair,
                               channels_.data() + channels_.size() / 2 + first_pair};
  for (Index t = first; t < first + count; ++t)
    for (const int* const channels : halves) {
      const auto at = static_cast<std::size_t>(t);
      const float* const key = keys_.row(tokens_[at]);
      const float norm = norms_.empty() ? 1.0f : norms_[at];
      if (channels[num_pairs - 1] - channels[0] == num_pairs - 1) {  // side by side
#pragma omp simd
        for (int i = 0; i < num_pairs; ++i) planar[i] = key[channels[0] + i] / norm * weights[i];
      } else {
        for (int i = 0; i < num_pairs; ++i) planar[i] = key[channels[i]] / norm * weights[i];
      }
      planar += num_pairs;
    }
}

}  // namespace commvq
