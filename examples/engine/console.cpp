#include "engine/console.hpp"

#include <cstdio>
#include <exception>

#include <unistd.h>

namespace engine {

ProgressLine::ProgressLine(std::string title)
    : title_(std::move(title)), terminal_(isatty(STDERR_FILENO) != 0), last_(start_) {}

ProgressLine::~ProgressLine() {
  const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
  if (terminal_ && shown_) std::fputs("\r\033[K", stderr);
  if (shown_ || seconds >= 2) std::fprintf(stderr, "%s: %.1f s\n", title_.c_str(), seconds);
}

void ProgressLine::update(double fraction, const std::string& detail) {
  const auto now = Clock::now();
  if (std::chrono::duration<double>(now - last_).count() < (terminal_ ? 0.2 : 10.0)) return;
  last_ = now;
  shown_ = true;
  const double seconds = std::chrono::duration<double>(now - start_).count();
  const double left = fraction > 0 ? seconds * (1 - fraction) / fraction : 0;
  std::fprintf(stderr, "%s%s: %3.0f%%, %.0f s, about %.0f s left%s%s%s",
               terminal_ ? "\r\033[K" : "", title_.c_str(), 100 * fraction, seconds, left,
               detail.empty() ? "" : " (", detail.c_str(), detail.empty() ? "" : ")");
  std::fputs(terminal_ ? "" : "\n", stderr);
  std::fflush(stderr);
}

int run_program(const std::function<int()>& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}

std::string human_bytes(double bytes) {
  const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  for (; bytes >= 1024 && unit < 4; ++unit) bytes /= 1024;
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.2f %s", bytes, units[unit]);
  return text;
}

std::string comma_separated(const std::vector<int>& numbers) {
  std::string text;
  for (const int number : numbers) {
    if (!text.empty()) text += ',';
    text += std::to_string(number);
  }
  return text;
}

}  // namespace engine
