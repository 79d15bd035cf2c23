#pragma once

/// COMMVQ_INSTRUMENTED is 1 in a build with a sanitizer that watches memory or threads, else 0.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define COMMVQ_INSTRUMENTED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define COMMVQ_INSTRUMENTED 1
#endif
#endif
#ifndef COMMVQ_INSTRUMENTED
#define COMMVQ_INSTRUMENTED 0
#endif

namespace commvq::testing_support {

/// How often a test repeats what it does: `instrumented` times with a sanitizer, which makes
/// everything tens of times slower and finds a fault the first time that its line is run.
constexpr int repeats(int full, int instrumented) {
  return COMMVQ_INSTRUMENTED != 0 ? instrumented : full;
}

}  // namespace commvq::testing_support
