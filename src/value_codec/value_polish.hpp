#pragma once

#include <vector>

#include "value_codec/value_layers.hpp"

namespace commvq::value_polish {

using value_layers::ConstMatrixMap;
using value_layers::Matrix;

/// E E^T, `[num_code_bits][num_code_bits]`, of the decoder E, `[num_code_bits][C]`.
Matrix<float> gram_of(const ConstMatrixMap<float>& decoder);

/// Improves binary codes b of values v (ours; not in the paper): flips single bits as long as that
/// lowers |v - s E^T b|^2, where s = <v, E^T b> / |E^T b|^2 is the best scale (iterated conditional
/// modes). The numbers of a `graded` code are moved as wholes in the place of bits, to the best of
/// their values: from 3 to 4, all three bits change, and each alone would do harm. `values` is
/// `[tokens][C]`, `bits` `[tokens][num_code_bits]`, zeros and ones. Makes at most `sweeps` passes
/// over the bits, in order. No token's error rises once <v, E^T b> > 0; a value of zero keeps a
/// code of zeros.
void polish(const ConstMatrixMap<float>& decoder, const ConstMatrixMap<float>& gram,
            const Matrix<float>& values, int sweeps, bool graded, Matrix<float>& bits);

}  // namespace commvq::value_polish
