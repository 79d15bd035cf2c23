#pragma once

#include <cstdint>
#include <vector>

#include "commvq/key_codec/codebook.hpp"

namespace commvq {

/// Finds the codes of keys of one head: beam search over the residual stages. With a beam of one it
/// is the paper's greedy encoder: per stage the best of the Nc^2 centres (CommVQ, section 3.3).
/// Immutable after construction; any number of threads may encode at once.
template <class Scalar>
class KeyEncoder {
 public:
  /// Precomputes per stage the inner products of book A with book B. Copies the codebook.
  explicit KeyEncoder(KeyCodebook<Scalar> codebook);

  const KeyCodebook<Scalar>& codebook() const { return codebook_; }

  /// Encodes `keys` `[tokens][head_dim]`, planar and already divided by the norm. `codes` is
  /// `[tokens][num_codes()]`. Minimises |key - decoded|^2 among the `beam_width` candidates kept
  /// after each stage; ties go to the smaller (candidate, A, B). `squared_error`, `[tokens]` or
  /// null, receives what remains. Parallel over tokens where the caller is not in a parallel region.
  void encode(MatrixView<const Scalar> keys, int beam_width, MatrixView<std::uint16_t> codes,
              Scalar* squared_error = nullptr) const;

 private:
  KeyCodebook<Scalar> codebook_;
};

}  // namespace commvq
