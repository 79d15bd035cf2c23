#pragma once

#include <functional>
#include <string>

namespace commvq {

/// What a long computation says of itself after each step.
struct Progress {
  std::string phase;       ///< what is being done, e.g. "keys: head 2/8, stage 3/11"
  double fraction = 0.0;   ///< of the whole call, in [0, 1], never falling
  double objective = 0.0;  ///< the error that the phase minimises, after this step
};

/// Called from the thread that started the computation. An exception thrown here ends it.
using ProgressCallback = std::function<void(const Progress&)>;

}  // namespace commvq
