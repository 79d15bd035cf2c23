#pragma once

#include <algorithm>
#include <string>

#include "commvq/learner/progress.hpp"

namespace commvq {

/// Reports the progress of a computation whose work is known beforehand.
class ProgressMeter {
 public:
  /// `callback` may be empty and must outlive the meter; `total` is in any unit of work.
  ProgressMeter(const ProgressCallback& callback, double total)
      : callback_(callback), total_(total) {}

  /// Adds work of the same unit and reports.
  void advance(const std::string& phase, double work, double objective) {
    done_ += work;
    if (callback_) callback_({phase, std::min(1.0, done_ / total_), objective});
  }

 private:
  const ProgressCallback& callback_;
  double total_;
  double done_ = 0;
};

}  // namespace commvq
