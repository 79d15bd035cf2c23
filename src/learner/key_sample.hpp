#pragma once

#include <random>
#include <vector>

#include "commvq/learner/key_learner.hpp"

namespace commvq {

/// `count` different indices below `size` in random order; all of them if `count` is larger. Takes
/// memory for `count` of them.
std::vector<Index> choose(Index size, Index count, std::mt19937_64& random);

/// A random choice of at most `max_tokens` of the keys that one head's codebook is learnt from:
/// planar, divided by their norm, with weights applied. Keeps positions and norms only, and reads
/// the keys from the caller's memory each time they are needed.
class KeySample {
 public:
  /// Of `keys` `[tokens][head_dim]`, planar and divided by their norm.
  KeySample(MatrixView<const float> keys, const KeyLearnerOptions& options,
            std::mt19937_64& random);
  /// Of head `head` of `keys` `[tokens][num_kv_heads * head_dim]` in channel order: of the tokens
  /// for which `KeyCodec` would store a norm other than zero; of one key of zeros if there are
  /// none.
  KeySample(MatrixView<const float> keys, int head, const KeyLearnerOptions& options,
            std::mt19937_64& random);

  Index size() const { return static_cast<Index>(tokens_.size()); }

  /// Writes pairs `[first_pair, first_pair + num_pairs)` of `count` keys of the sample, from
  /// `first` on: `planar` is `[count][2 * num_pairs]`. Any number of threads may call at once.
  void read(Index first, Index count, int first_pair, int num_pairs, float* planar) const;

 private:
  KeySample(MatrixView<const float> keys, const KeyLearnerOptions& options);

  MatrixView<const float> keys_;  // the head's channels
  std::vector<int> channels_;     // [2 * num_pairs]: where planar channels lie in keys_
  std::vector<float> weights_;    // [num_pairs]
  std::vector<Index> tokens_;
  std::vector<float> norms_;  // of tokens_; none if the keys are divided already
};

}  // namespace commvq
