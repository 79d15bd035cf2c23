#pragma once

#include <memory>
#include <span>
#include <string_view>

#include "commvq/core/digest.hpp"
#include "commvq/core/view.hpp"

namespace commvq::detail {

/// Computes the digest of bytes that come piece by piece; how they are cut does not matter.
class Hasher {
 public:
  Hasher();
  ~Hasher();
  Hasher(const Hasher&) = delete;
  Hasher& operator=(const Hasher&) = delete;

  void add(std::span<const std::uint8_t> bytes);
  void add(std::string_view text);
  void add(std::span<const float> values);
  /// Eight bytes, so that what a following array means is part of the digest.
  void add(Index number);

  Digest digest() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace commvq::detail
