#pragma once

#include <vector>

#include "commvq/key_codec/codebook.hpp"

#include "learner/key_em.hpp"

namespace commvq {

/// How often codes occur together, and the keys that carry them, within one group: what joint least
/// squares needs of the keys. Row `k * codebook_size + c` stands for centroid c of the k-th of the
/// group's 2 * num_stages books.
struct Occurrences {
  Eigen::MatrixXd counts;  ///< [rows][rows]: keys that have both codes
  Eigen::MatrixXd sums;    ///< [rows][2g]: of the keys that have the code, planar
};

/// What learning the codebook of one head asks of all its keys at once, so that keys and codes may
/// lie where the work is done. Starts with all codes 0.
class KeyWork {
 public:
  using Matrix = key_em::Matrix;

  virtual ~KeyWork() = default;
  virtual Index size() const = 0;  ///< keys

  /// Makes what the first `stage` stages leave of the keys of a group the residuals of the calls
  /// below. `codebook` holds those stages and must outlive these calls.
  virtual void begin_stage(const KeyCodebook<float>& codebook, int group, int stage) = 0;
  /// Residuals of `keys`, `[keys.size()][2g]`.
  virtual Matrix residuals(const std::vector<Index>& keys) = 0;
  /// See key_em::soft_assign.
  virtual key_em::Statistics soft_assign(const Matrix& books, double temperature) = 0;
  /// Takes every residual's nearest centre as code of the stage.
  virtual void assign(const Matrix& books) = 0;

  /// Encodes all keys anew by beam search. With `keep` a key whose codes are no worse keeps them.
  /// Returns `error`.
  virtual double encode(const KeyCodebook<float>& codebook, int beam_width, bool keep) = 0;
  /// Mean of |key - decoded|^2.
  virtual double error(const KeyCodebook<float>& codebook) = 0;
  virtual Occurrences occurrences(int group) = 0;
};

}  // namespace commvq
