#pragma once

#include "commvq/key_codec/config.hpp"

namespace commvq::testing_support {

/// What tests of key learners vary.
struct KeyShape {
  int head_dim, group_pairs, codebook_size, num_stages;
  bool tied;
  bool graded = false;

  KeyCodecConfig config() const {
    KeyCodecConfig config;
    config.pairs = {head_dim, head_dim, RopeLayout::kHalfSplit};
    config.group_pairs = group_pairs;
    config.codebook_size = codebook_size;
    config.num_stages = num_stages;
    config.tied = tied;
    config.graded = graded;
    return config;
  }
};

}  // namespace commvq::testing_support
