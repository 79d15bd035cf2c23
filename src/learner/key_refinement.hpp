#pragma once

#include <functional>
#include <vector>

#include "learner/key_sample.hpp"

namespace commvq {

/// Joint least squares over all stages' books at fixed codes, alternating with re-encoding by beam
/// search. `batch_tokens` keys are in memory at once. Changes `codebook` in place, and `codes`
/// `[tokens][num_codes]`, of which only the memory is used; a solve or a key's new codes are kept
/// only where they lower the error, so the returned objectives (mean squared error per key: at the
/// start, then after every solve and every re-encoding) never rise. `done` is called after each
/// round with its number and objective.
std::vector<double> refine_key_codebook(const KeySample& keys, const KeyRefinement& refinement,
                                        Index batch_tokens, KeyCodebook<float>& codebook,
                                        std::vector<std::uint16_t>& codes,
                                        const std::function<void(int, double)>& done);

}  // namespace commvq
