#pragma once

#include <functional>
#include <memory>

#include "commvq/core/export.h"
#include "commvq/learner/value_trainer.hpp"

#include "learner/value_work.hpp"

/// The value trainer without the place where its work is done.
namespace commvq::value_learning {

/// Makes the work on the values of a block, coded by one network, from its initial weights.
using MakeWork = std::function<std::unique_ptr<ValueWork>(MatrixView<const float> values,
                                                          const ValueCodecConfig& config,
                                                          const ValueCodecWeights& initial)>;

/// Checks options and values, trains and refines: see train_value_codec.
COMMVQ_API ValueCodec train(MatrixView<const float> values, const ValueTrainerOptions& options,
                            const MakeWork& make_work, ValueTrainerReport* report);

}  // namespace commvq::value_learning
