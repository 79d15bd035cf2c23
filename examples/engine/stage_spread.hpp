#pragma once

#include <functional>
#include <span>
#include <vector>

#include "commvq/io/codebook_file.hpp"
#include "commvq/learner/query_statistics.hpp"

#include "engine/learner.hpp"
#include "engine/model.hpp"

namespace engine {

/// What coding one side of one layer alone does to the next token's distribution, see `divergence`:
/// a number for each layer, 0 where its side has no codec.
struct LayerDivergences {
  std::vector<double> keys, values;
};

/// Measures it over one window of text, of which the newest `exact_window` and the first `sinks`
/// tokens stay exact; tokens before `exact_window` are not counted. `progress`, if given, receives
/// the share that is done, one call at a time.
LayerDivergences measure_layers(const Model& model, const std::vector<commvq::LayerCodec>& codecs,
                                std::span<const int> window, Index exact_window, Index sinks,
                                const std::function<void(double)>& progress = {});

/// Stages up to which `step_time` is known.
inline constexpr int kMostTimedStages = 44;

/// What the keys of a layer cost a step of decoding on a device, in microseconds, by their number
/// of stages: measured with earlier kernels, as bench/README.md says under "Layers of other stages".
/// Throws `Error` for numbers outside [1, kMostTimedStages].
int step_time(int stages);

/// Stages of every layer's keys, so that the divergences, measured with `stages` for each layer
/// alone, add up to the least, and neither the stages nor the layers' `step_time` to more than with
/// `stages` each. A stage more multiplies a divergence by 0.87 (measured, from 4 to 22 stages: 0.82
/// to 0.95). No layer gets less than a third or more than twice as many. Throws `Error` if twice as
/// many are not timed.
std::vector<int> spread_stages(const std::vector<double>& divergences, int stages);

/// How the keys of a layer are to be learnt.
using KeyOptionsOf = std::function<commvq::KeyLearnerOptions(
    std::size_t layer, const commvq::QueryStatistics& queries)>;

/// Proposes such stages for a model that is yet to be calibrated on `contexts`: learns the keys of
/// all layers briefly, from about 4,096 tokens, and measures them on the last context. `options_of`
/// gives all layers as many stages.
std::vector<int> propose_stages(const Learner& learner, const Model& model,
                                const std::vector<std::vector<int>>& contexts,
                                const KeyOptionsOf& options_of,
                                const std::function<void(double)>& progress = {});

}  // namespace engine
