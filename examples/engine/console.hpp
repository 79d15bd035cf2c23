#pragma once

#include <chrono>
#include <functional>
#include <string>
#include <vector>

namespace engine {

/// One line on standard error that says how far a long work is; on a terminal it is rewritten in
/// place, elsewhere it is printed every ten seconds.
class ProgressLine {
 public:
  explicit ProgressLine(std::string title);
  ~ProgressLine();
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  /// `fraction` in [0, 1]; `detail` says what is being done.
  void update(double fraction, const std::string& detail = "");

 private:
  using Clock = std::chrono::steady_clock;

  std::string title_;
  bool terminal_;
  Clock::time_point start_ = Clock::now();
  Clock::time_point last_;
  bool shown_ = false;
};

/// Runs a program's body: an exception becomes a message on standard error and exit status 1.
int run_program(const std::function<int()>& body);

/// Bytes as people read them, e.g. "1.25 MiB".
std::string human_bytes(double bytes);

/// Numbers as options take them, e.g. "1,2,3".
std::string comma_separated(const std::vector<int>& numbers);

}  // namespace engine
