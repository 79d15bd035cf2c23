#pragma once

#include <memory>
#include <random>
#include <vector>

#include "commvq/core/export.h"
#include "commvq/learner/key_learner.hpp"

#include "learner/key_work.hpp"

/// The key learner without the place where its work is done.
namespace commvq::key_learning {

/// Learns the codebook of one head stage by stage, group by group, and refines it.
COMMVQ_API KeyCodebook<float> learn(KeyWork& keys, const KeyLearnerOptions& options,
                                    std::mt19937_64& random, KeyLearnerReport* report);

/// Throws `Error` for options or keys of one head, `[tokens][head_dim]`, that cannot be learnt
/// from.
COMMVQ_API void check_head(MatrixView<const float> keys, const KeyLearnerOptions& options);

/// Throws `Error` for options or keys of a layer, `[tokens][num_kv_heads * head_dim]`, that cannot
/// be learnt from. Returns the number of heads.
COMMVQ_API int check_layer(MatrixView<const float> keys, const KeyLearnerOptions& options);

/// What one head of a layer is learnt with: a seed and weights of its own, and whatever progress it
/// is given.
COMMVQ_API KeyLearnerOptions options_of_head(const KeyLearnerOptions& options, int head,
                                             ProgressCallback progress);

}  // namespace commvq::key_learning
