#pragma once

#include <vector>

#include "commvq/learner/key_learner.hpp"
#include "commvq/learner/value_trainer.hpp"

/// The learners of commvq/learner with their work on the current device (target
/// `commvq::cuda_learner`): the same options, reports and errors, results equal up to rounding. All
/// arrays are host memory. The device needs room for the layer at hand: about 2.5 KB a key and head
/// at Llama-3.1-8B's shape.
///
/// The same seed, input and device model give the same codecs. These calls allocate, wait for the
/// device, and throw `Error` where it fails or lacks memory.
namespace commvq::cuda {

/// See commvq::learn_key_codec. Heads are learnt side by side; `options.progress` is called from
/// their threads, one at a time. Takes codebooks of at most 512 centroids, at most 256 stages and
/// beams of at most 16 and throws `Error` for others.
KeyCodec learn_key_codec(MatrixView<const float> keys, const KeyLearnerOptions& options,
                         std::vector<KeyLearnerReport>* reports = nullptr);

/// See commvq::train_value_codec.
ValueCodec train_value_codec(MatrixView<const float> values, const ValueTrainerOptions& options,
                             ValueTrainerReport* report = nullptr);

}  // namespace commvq::cuda
