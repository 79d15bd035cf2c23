#pragma once

#include <functional>
#include <vector>

#include "commvq/learner/key_learner.hpp"

#include "learner/key_work.hpp"

namespace commvq {

/// Joint least squares over all stages' books at fixed codes, alternating with re-encoding by beam
/// search. Changes `codebook` in place; a solve or a key's new codes are kept only where they lower
/// the error, so the returned objectives (mean squared error per key: at the start, then after every
/// solve and every re-encoding) never rise. `done` is called after each round with its number and
/// objective.
std::vector<double> refine_key_codebook(KeyWork& keys, const KeyRefinement& refinement,
                                        KeyCodebook<float>& codebook,
                                        const std::function<void(int, double)>& done);

}  // namespace commvq
