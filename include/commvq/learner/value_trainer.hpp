#pragma once

#include <cstdint>
#include <vector>

#include "commvq/core/export.h"
#include "commvq/learner/progress.hpp"
#include "commvq/value_codec/value_codec.hpp"

namespace commvq {

/// Least squares for the decoder after the training (ours; not in the paper).
struct ValueRefinement {
  int rounds = 0;          ///< alternations of solving and encoding anew; 0: the paper's decoder
  int max_tokens = 16384;  ///< of the values, evenly spread
  double ridge = 1e-3;     ///< proximal ridge, relative to the mean diagonal of the normal matrix
};

/// Which value codec is trained, and how.
struct COMMVQ_API ValueTrainerOptions {
  ValueCodecConfig codec;
  int steps = 2000;             ///< Adam steps
  int batch_tokens = 256;       ///< values per step, drawn at random
  double learning_rate = 3e-3;  ///< peak; linear warm-up over the first 5%, then cosine to zero
  double temperature = 1.0;     ///< of the Gumbel softmax
  std::uint64_t seed = 1;
  ValueRefinement refinement;
  ProgressCallback progress;  ///< may be empty

  /// Throws `Error` naming the first field that is out of range.
  void validate() const;

  /// The paper's trainer.
  static ValueTrainerOptions paper(const ValueCodecConfig& codec);
  /// The library's own: a shorter training, which the polish of codes makes up for, and least
  /// squares for the decoder.
  static ValueTrainerOptions commvq(const ValueCodecConfig& codec);
};

/// What a training ended with, one block after another.
struct ValueTrainerReport {
  /// Relative squared error |v - decoded|^2 / |v|^2, mean over the batch, after each step.
  std::vector<double> objectives;
  /// The same over the refinement's values, as the codec will code them: before the refinement and
  /// after each round. The best is kept.
  std::vector<double> refinement_objectives;
};

/// Trains a value codec on `values` `[tokens][C]` (CommVQ, section 3.2): Gumbel softmax with hard
/// samples and straight-through gradients, mean squared error of the value scaled to unit norm,
/// Adam, cosine schedule. The same seed and input give the same weights, with any number of
/// threads. Then, if asked for, alternates least squares for the decoder with encoding anew. Zero
/// values are left out. Each block is trained by itself, as `train_value_codec` would on its
/// channels alone. Throws `Error` for no tokens, wrong shapes, or NaN and infinity.
COMMVQ_API ValueCodec train_value_codec(MatrixView<const float> values,
                                        const ValueTrainerOptions& options,
                                        ValueTrainerReport* report = nullptr);

}  // namespace commvq
