#pragma once

#include <functional>
#include <vector>

#include "commvq/learner/value_trainer.hpp"

#include "learner/value_work.hpp"

namespace commvq {

/// Least squares for the decoder E at the codes that the whole encoder, polish included, finds for
/// the values `rows`, alternating with encoding anew: minimises the sum over values of
/// |v / |v| - s E^T b|^2 at fixed codes b and scales s, among graded decoders where codes are
/// `graded`. Keeps the best weights met. Returns the mean relative squared error at the start and
/// after every round; `done` is called after each.
std::vector<double> refine_value_decoder(ValueWork& values, const std::vector<Index>& rows,
                                         const ValueRefinement& refinement, bool graded,
                                         ValueCodecWeights& weights,
                                         const std::function<void(int, double)>& done);

}  // namespace commvq
