#pragma once

#include "commvq/core/view.hpp"

namespace commvq {

/// Which two channels of a head RoPE rotates together.
enum class RopeLayout {
  kHalfSplit,    ///< channel i with i + rotary_dim / 2 (GPT-NeoX, Hugging Face Llama)
  kInterleaved,  ///< channel 2i with 2i + 1 (GPT-J, GGUF Llama)
};

/// The channels of one head read as head_dim / 2 complex numbers, one per RoPE pair.
///
/// Only the first `rotary_dim` channels rotate; the rest pass through RoPE unchanged and are paired
/// with each other in the same layout, so that every channel belongs to exactly one pair.
///
/// The *planar* form of a head, used by codebooks and kernels, is `[real parts][imaginary parts]`,
/// `num_pairs()` each. For a fully rotated half-split head it is the channel order itself.
struct PairLayout {
  int head_dim = 128;
  int rotary_dim = 128;
  RopeLayout layout = RopeLayout::kHalfSplit;

  bool operator==(const PairLayout&) const = default;

  int num_pairs() const { return head_dim / 2; }
  int num_rotary_pairs() const { return rotary_dim / 2; }

  /// Channel of the real part of `pair`.
  int real_channel(int pair) const { return channel_of(pair, 0); }
  /// Channel of the imaginary part of `pair`.
  int imag_channel(int pair) const { return channel_of(pair, 1); }

  /// True where planar form and channel order coincide.
  bool is_planar() const {
    return layout == RopeLayout::kHalfSplit && rotary_dim == head_dim;
  }

  /// Throws `Error` unless both dimensions are even, head_dim is in [2, 1024] and rotary_dim in
  /// [0, head_dim].
  void validate() const {
    require(head_dim >= 2 && head_dim <= 1024 && head_dim % 2 == 0, "head_dim is ", head_dim,
            "; it must be even and in [2, 1024]");
    require(rotary_dim >= 0 && rotary_dim <= head_dim && rotary_dim % 2 == 0, "rotary_dim is ",
            rotary_dim, "; it must be even and in [0, head_dim = ", head_dim, "]");
  }

  /// Channel order `[head_dim]` to planar order `[head_dim]`; the arrays must not overlap.
  template <class In, class Out>
  void to_planar(const In* channels, Out* planar) const {
    for (int pair = 0; pair < num_pairs(); ++pair) {
      planar[pair] = static_cast<Out>(channels[real_channel(pair)]);
      planar[pair + num_pairs()] = static_cast<Out>(channels[imag_channel(pair)]);
    }
  }

  /// Planar order `[head_dim]` to channel order `[head_dim]`; the arrays must not overlap.
  template <class In, class Out>
  void from_planar(const In* planar, Out* channels) const {
    for (int pair = 0; pair < num_pairs(); ++pair) {
      channels[real_channel(pair)] = static_cast<Out>(planar[pair]);
      channels[imag_channel(pair)] = static_cast<Out>(planar[pair + num_pairs()]);
    }
  }

 private:
  int channel_of(int pair, int part) const {
    const bool rotates = pair < num_rotary_pairs();
    const int first_channel = rotates ? 0 : rotary_dim;
    const int pairs_in_block = rotates ? num_rotary_pairs() : num_pairs() - num_rotary_pairs();
    const int index = rotates ? pair : pair - num_rotary_pairs();
    return first_channel + (layout == RopeLayout::kHalfSplit ? index + part * pairs_in_block
                                                             : 2 * index + part);
  }
};

}  // namespace commvq
