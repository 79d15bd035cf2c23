#pragma once

#include <functional>

#include "commvq/core/view.hpp"

namespace engine {

/// Runs `task(i)` for every i in [0, count): side by side where there are enough of them for the
/// threads, one after another, each with all threads, where there are not. An exception of a task
/// is thrown again once the others have ended.
void for_each_task(commvq::Index count, const std::function<void(commvq::Index)>& task);

}  // namespace engine
