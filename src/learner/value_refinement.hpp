#pragma once

#include "commvq/learner/value_trainer.hpp"

namespace commvq {

/// Least squares for the decoder E at the codes that the whole encoder, polish included, finds,
/// alternating with encoding anew: minimises the sum over values of |v / |v| - s E^T b|^2 at fixed
/// codes b and scales s. `values` is `[tokens][C]`. Changes `weights.decoder` and keeps the best
/// met. Returns the mean relative squared error at the start and after every round.
std::vector<double> refine_value_decoder(MatrixView<const float> values,
                                         const ValueRefinement& refinement,
                                         const ValueCodecConfig& config, ValueCodecWeights& weights,
                                         const std::function<void(int, double)>& done);

}  // namespace commvq
