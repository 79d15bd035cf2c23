#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "commvq/core/error.hpp"

#include "fuzz/memory_meter.hpp"

/// What every harness demands of the code that it feeds.
namespace commvq::fuzz {

/// A reason is to be read by a person, on a terminal.
constexpr std::size_t kMaxReasonBytes = 2000;

/// Memory that any input may cost, however small: containers, messages, tables of fixed size.
constexpr std::size_t kFixedBytes = std::size_t{1} << 20;

/// Ends the process; the fuzzer keeps the input.
[[noreturn]] inline void report(const std::string& defect) {
  std::fprintf(stderr, "FINDING: %s\n", defect.c_str());
  std::abort();
}

/// Reports `defect` unless `condition` holds.
inline void demand(bool condition, const char* defect) {
  if (!condition) report(defect);
}

inline void demand_readable(std::string_view reason) {
  demand(!reason.empty(), "a rejection without a reason");
  demand(reason.size() <= kMaxReasonBytes, "a reason longer than a screen");
  demand(std::ranges::none_of(
             reason, [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }),
         "a reason with control characters");
}

/// Runs `action` on an input of `input_bytes`. True if it accepts the input, false if it rejects it
/// with a readable `Error`. Anything else that is thrown, and more than `multiple` times the
/// input's size and `kFixedBytes` of memory held at once, ends the process.
template <class Action>
bool accepts(std::size_t input_bytes, std::size_t multiple, Action&& action) {
  const MemoryMeter meter(multiple * input_bytes + kFixedBytes);
  try {
    action();
    return true;
  } catch (const Error& error) {
    demand_readable(error.what());
    return false;
  } catch (const std::exception& error) {
    report(std::string("an exception that is no commvq::Error: ") + error.what());
  }
}

}  // namespace commvq::fuzz
