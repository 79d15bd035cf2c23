#pragma once

#include <cstdint>
#include <vector>

#include "commvq/core/export.h"
#include "commvq/key_codec/key_codec.hpp"
#include "commvq/learner/progress.hpp"

namespace commvq {

/// Joint least squares after the stage-wise learning (ours; not in the paper).
struct KeyRefinement {
  int rounds = 0;       ///< alternations of solving and re-encoding; 0 leaves the paper's result
  int beam_width = 8;   ///< beam of the re-encoding
  double ridge = 1e-3;  ///< proximal ridge, relative to the mean diagonal of the normal matrix
};

/// Which key codec is learnt, and how.
struct COMMVQ_API KeyLearnerOptions {
  KeyCodecConfig codec;
  int max_steps = 100;              ///< EM steps per stage
  double first_temperature = 1e-3;  ///< the soft assignment's temperature at step 0 ...
  double last_temperature = 1e-5;   ///< ... and at the last step; exponential in between
  int stages_per_decade = 4;        ///< both are divided by 10 after every so many stages
  int max_tokens = 65536;           ///< learn from a random choice of at most so many keys
  int batch_tokens = 4096;          ///< tokens whose keys and assignments are in memory at once
  std::uint64_t seed = 1;
  KeyRefinement refinement;
  /// Of the error that is minimised, learning and later encoding, `[num_kv_heads][num_pairs]` (one
  /// head for `learn_key_codebook`); empty: all ones. See `KeyCodebook` and `QueryStatistics`.
  std::vector<float> pair_weights;
  ProgressCallback progress;  ///< may be empty

  /// Throws `Error` naming the first field that is out of range.
  void validate() const;

  /// The paper's learner: EM alone.
  static KeyLearnerOptions paper(const KeyCodecConfig& codec);
  /// The library's own: a few EM steps, then joint least squares; the temperature falls with the
  /// bits of the stages. Of graded codes joint least squares alone. Weights are for the caller to
  /// add.
  static KeyLearnerOptions commvq(const KeyCodecConfig& codec);
};

/// Mean squared error per key (not per channel), of keys that were divided by their norm, with
/// weights.
struct KeyLearnerReport {
  /// `[num_groups * num_stages][steps taken + 1]`: error of the hard assignment before the first
  /// step and after each; the stage keeps the smallest. Empty for graded codes.
  std::vector<std::vector<double>> stage_objectives;
  /// Error over the whole key: before it with the refinement's encoder, then after every solve and
  /// every re-encoding. Never rises.
  std::vector<double> refinement_objectives;
};

/// Learns the codebook of one head from `keys` `[tokens][head_dim]`: planar order, divided by the
/// norm of their token (see `KeyCodec`).
///
/// Stage by stage on the residual x, alternating (CommVQ, section 3.3):
///   E: p(A,B | x) = softmax over (A,B) of -|x - z_A - j z_B|^2 / T
///   M: minimise sum_AB w_AB |mu_AB - z_A - j z_B|^2, one Hermitian system of size Nc.
/// An untied codebook learns two books per stage by the same alternation. Then, if asked for, joint
/// least squares of all books at fixed codes, alternating with re-encoding.
///
/// Graded codes begin with the axes of the keys' covariance, longest first, in uniform steps; the
/// joint least squares then are over the fixed vector and the directions, so that rows stay
/// multiples of these. At the end `KeyCodebook::derive_graded_rows` makes them exact.
///
/// The same seed and input give the same codebook, with any number of threads. Fewer tokens than
/// centroids are allowed; an empty cluster keeps its centroid. Throws `Error` for no tokens, wrong
/// shapes, weights that are not positive, or NaN and infinity.
COMMVQ_API KeyCodebook<float> learn_key_codebook(MatrixView<const float> keys,
                                                 const KeyLearnerOptions& options,
                                                 KeyLearnerReport* report = nullptr);

/// Learns a layer's codec from `keys` `[tokens][num_kv_heads * head_dim]`, channel order, before
/// RoPE, not normalised: divides by the norms that the codec will store, then learns each head.
/// Keys with norm 0 are left out.
///
/// `keys` are read in batches, as often as they are needed, and not copied. Besides the work of
/// `batch_tokens` of them, memory is taken, for one head at a time, for each of the at most
/// `max_tokens` keys that are learnt from: position, norm and codes (12 + 2 * num_codes bytes, 56
/// with 11 stages and one group), and about 80 bytes before that while they are chosen. Stages and
/// re-encodings hand codes on to each other; residuals are made from keys and codes whenever a
/// batch of them is needed.
///
/// Throws `Error` if all keys are zero. `reports` is null or receives one report a head.
COMMVQ_API KeyCodec learn_key_codec(MatrixView<const float> keys, const KeyLearnerOptions& options,
                                    std::vector<KeyLearnerReport>* reports = nullptr);

}  // namespace commvq
