#pragma once

#include <cmath>
#include <numbers>
#include <string>
#include <vector>

#include "commvq/core/export.h"
#include "commvq/rope/pair_layout.hpp"

namespace commvq {

/// How the frequencies of RoPE are stretched for long contexts.
enum class RopeScaling {
  kNone,
  kLinear,  ///< every frequency divided by `factor` (position interpolation)
  kLlama3,  ///< Llama 3.1: long wavelengths divided by `factor`, short ones kept, smooth between
};

/// Everything that determines the rotation of a head at a position.
struct RopeConfig {
  PairLayout pairs;
  double theta = 10000.0;  ///< base of the frequencies
  RopeScaling scaling = RopeScaling::kNone;
  double factor = 1.0;                    ///< kLinear and kLlama3: the stretch, >= 1
  double low_freq_factor = 1.0;           ///< kLlama3
  double high_freq_factor = 4.0;          ///< kLlama3, > low_freq_factor
  double original_max_position = 8192.0;  ///< kLlama3: context length before the stretch

  bool operator==(const RopeConfig&) const = default;

  /// Throws `Error` naming the first field that is out of range.
  void validate() const {
    pairs.validate();
    require(std::isfinite(theta) && theta > 1.0, "RoPE theta is ", theta, "; it must be above 1");
    if (scaling == RopeScaling::kNone) return;
    require(std::isfinite(factor) && factor >= 1.0, "RoPE scaling factor is ", factor,
            "; it must be at least 1");
    if (scaling == RopeScaling::kLinear) return;
    require(low_freq_factor > 0.0 && high_freq_factor > low_freq_factor &&
                std::isfinite(high_freq_factor),
            "RoPE low_freq_factor ", low_freq_factor, " and high_freq_factor ", high_freq_factor,
            " must satisfy 0 < low < high");
    require(std::isfinite(original_max_position) && original_max_position > 0.0,
            "RoPE original_max_position_embeddings is ", original_max_position,
            "; it must be positive");
  }
};

/// Reads the RoPE of a Hugging Face model from the text of its `config.json`: `rope_theta`,
/// `head_dim` (or `hidden_size / num_attention_heads`), `partial_rotary_factor` and `rope_scaling`
/// (`rope_type` or `type`: default, linear, llama3; also the newer `rope_parameters` object).
/// Throws `Error` for malformed JSON, for values out of range and for any other RoPE type, which it
/// names.
COMMVQ_API RopeConfig parse_hf_rope(const std::string& config_json,
                                    RopeLayout layout = RopeLayout::kHalfSplit);

/// The rotations of one head: the single definition of RoPE in the library.
/// At position n, pair i is multiplied by e^{j n frequency(i)}; pairs past the rotary dimension
/// have frequency 0. Angles are computed in double precision, so positions of several millions
/// keep their phase to about 1e-9.
class Rope {
 public:
  explicit Rope(const RopeConfig& config) : config_(config) {
    config.validate();
    frequencies_.resize(static_cast<std::size_t>(config.pairs.num_pairs()), 0.0);
    for (int pair = 0; pair < config.pairs.num_rotary_pairs(); ++pair)
      frequencies_[static_cast<std::size_t>(pair)] = scaled_frequency(pair);
  }

  const RopeConfig& config() const { return config_; }
  const PairLayout& pairs() const { return config_.pairs; }

  /// Angle per position of `pair`, radians.
  double frequency(int pair) const { return frequencies_[static_cast<std::size_t>(pair)]; }

  /// Writes e^{j position frequency(i)} for every pair as `[cosines][sines]`, num_pairs() each.
  template <class Scalar>
  void rotation_at(Index position, Scalar* rotation) const {
    const int num_pairs = pairs().num_pairs();
    for (int pair = 0; pair < num_pairs; ++pair) {
      const double angle = static_cast<double>(position) * frequency(pair);
      rotation[pair] = static_cast<Scalar>(std::cos(angle));
      rotation[pair + num_pairs] = static_cast<Scalar>(std::sin(angle));
    }
  }

  /// Rotates one planar head `[head_dim]` in place by `rotation` as `rotation_at` writes it.
  template <class Scalar>
  static void rotate_planar(Scalar* head, const Scalar* rotation, int num_pairs) {
    Scalar* const imag = head + num_pairs;
    const Scalar* const sines = rotation + num_pairs;
#pragma omp simd
    for (int i = 0; i < num_pairs; ++i) {
      const Scalar re = head[i];
      const Scalar im = imag[i];
      head[i] = re * rotation[i] - im * sines[i];
      imag[i] = re * sines[i] + im * rotation[i];
    }
  }

  /// Rotates heads in channel order in place: `heads` is `[tokens][num_heads * head_dim]`, row t
  /// stands at position `first_position + t`.
  template <class Scalar>
  void apply(MatrixView<Scalar> heads, Index first_position) const {
    const int head_dim = pairs().head_dim;
    const int num_pairs = pairs().num_pairs();
    require(heads.cols % head_dim == 0, "RoPE on rows of ", heads.cols,
            " channels: not a multiple of head_dim = ", head_dim);
    std::vector<Scalar> rotation(static_cast<std::size_t>(head_dim));
    std::vector<Scalar> planar(static_cast<std::size_t>(head_dim));
    for (Index t = 0; t < heads.rows; ++t) {
      rotation_at(first_position + t, rotation.data());
      for (Scalar* head = heads.row(t); head < heads.row(t) + heads.cols; head += head_dim) {
        pairs().to_planar(head, planar.data());
        rotate_planar(planar.data(), rotation.data(), num_pairs);
        pairs().from_planar(planar.data(), head);
      }
    }
  }

 private:
  double scaled_frequency(int pair) const {
    const double exponent = -2.0 * pair / static_cast<double>(config_.pairs.rotary_dim);
    const double frequency = std::pow(config_.theta, exponent);
    if (config_.scaling == RopeScaling::kNone) return frequency;
    const double stretched = frequency / config_.factor;
    if (config_.scaling == RopeScaling::kLinear) return stretched;
    // Llama 3.1: by the number of turns that the original context makes.
    const double turns = config_.original_max_position * frequency / (2.0 * std::numbers::pi);
    if (turns < config_.low_freq_factor) return stretched;
    if (turns > config_.high_freq_factor) return frequency;
    const double share =
        (turns - config_.low_freq_factor) / (config_.high_freq_factor - config_.low_freq_factor);
    return (1.0 - share) * stretched + share * frequency;
  }

  RopeConfig config_;
  std::vector<double> frequencies_;
};

}  // namespace commvq
