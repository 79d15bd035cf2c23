#pragma once

#include <limits>
#include <vector>

#include "commvq/key_codec/codebook.hpp"

/// The key codec in double precision, written straight from the definition.
namespace commvq::reference {

template <class Scalar>
double squared_weight(const KeyCodebook<Scalar>& codebook, int pair) {
  if (codebook.pair_weights.empty()) return 1.0;
  const double weight = codebook.pair_weights[static_cast<std::size_t>(pair)];
  return weight * weight;
}

/// Squared distance of a planar key from what its codes decode to, with the codebook's weights.
template <class Scalar>
double squared_error(const KeyCodebook<Scalar>& codebook, const Scalar* key,
                     const std::uint16_t* codes) {
  const KeyCodecConfig& config = codebook.config;
  const int g = config.group_pairs;
  double total = 0;
  for (int pair = 0; pair < config.pairs.num_pairs(); ++pair)
    for (int part = 0; part < 2; ++part) {
      double left = key[part * config.pairs.num_pairs() + pair];
      for (int stage = 0; stage < config.num_stages; ++stage)
        for (int which = 0; which < 2; ++which) {
          const int code = codes[(pair / g * config.num_stages + stage) * 2 + which];
          left -= codebook.book(pair / g, stage, which)[code * 2 * g + part * g + pair % g];
        }
      total += squared_weight(codebook, pair) * left * left;
    }
  return total;
}

/// Greedy encoding by trying every centre of every stage.
template <class Scalar>
std::vector<std::uint16_t> encode_greedily(const KeyCodebook<Scalar>& codebook, const Scalar* key) {
  const KeyCodecConfig& config = codebook.config;
  const int g = config.group_pairs, num_pairs = config.pairs.num_pairs();
  std::vector<std::uint16_t> codes;
  for (int group = 0; group < config.num_groups(); ++group) {
    std::vector<double> left;
    for (int part = 0; part < 2; ++part)
      for (int i = 0; i < g; ++i) left.push_back(key[part * num_pairs + group * g + i]);
    for (int stage = 0; stage < config.num_stages; ++stage) {
      double least = std::numeric_limits<double>::infinity();
      int best_a = 0, best_b = 0;
      for (int a = 0; a < config.codebook_size; ++a)
        for (int b = 0; b < config.codebook_size; ++b) {
          double error = 0;
          for (int i = 0; i < 2 * g; ++i) {
            const double d = left[static_cast<std::size_t>(i)] -
                             codebook.book(group, stage, 0)[a * 2 * g + i] -
                             codebook.book(group, stage, 1)[b * 2 * g + i];
            error += squared_weight(codebook, group * g + i % g) * d * d;
          }
          if (error < least) least = error, best_a = a, best_b = b;
        }
      for (int i = 0; i < 2 * g; ++i)
        left[static_cast<std::size_t>(i)] -= codebook.book(group, stage, 0)[best_a * 2 * g + i] +
                                             codebook.book(group, stage, 1)[best_b * 2 * g + i];
      codes.push_back(static_cast<std::uint16_t>(best_a));
      codes.push_back(static_cast<std::uint16_t>(best_b));
    }
  }
  return codes;
}

}  // namespace commvq::reference
