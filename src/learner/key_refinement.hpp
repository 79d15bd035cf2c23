#pragma once

#include "commvq/learner/key_learner.hpp"

namespace commvq {

/// Joint least squares over all stages' books at fixed codes, alternating with re-encoding by beam
/// search. `keys` is `[tokens][head_dim]`, planar and divided by the norm. Changes `codebook` in
/// place; a solve or a key's new codes are kept only where they lower the error, so the returned
/// objectives (mean squared error per key: at the start, then after every solve and every
/// re-encoding) never rise. `done` is called after each round with its number and objective.
std::vector<double> refine_key_codebook(MatrixView<const float> keys,
                                        const KeyRefinement& refinement,
                                        KeyCodebook<float>& codebook,
                                        const std::function<void(int, double)>& done);

}  // namespace commvq
