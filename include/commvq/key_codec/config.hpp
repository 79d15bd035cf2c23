#pragma once

#include <algorithm>

#include "commvq/core/bit_packing.hpp"
#include "commvq/core/graded_bits.hpp"
#include "commvq/rope/pair_layout.hpp"

namespace commvq {

/// Shape of the complex additive codebook of one key head (CommVQ, section 3; see `KeyCodebook`).
struct KeyCodecConfig {
  PairLayout pairs;            ///< head_dim and which channels form a complex number
  int group_pairs = 64;        ///< g: RoPE pairs that share a code; divides head_dim / 2
  int codebook_size = 64;      ///< Nc: centroids per book, in [2, 65536]
  int num_stages = 11;         ///< R: residual stages, in [1, 1024]
  bool tied = true;            ///< paper: the second book of a stage is j times the first
  int beam_width = 1;          ///< candidates kept per stage when encoding; 1 is the paper's greedy
  bool norm_per_head = false;  ///< paper: one norm a token over all heads; true: one a head
  /// Untied books of two rows that share directions: the codes of four stages, eight bits, are
  /// numbers of 3, 2, 2 and 1 bits, the most significant bit first, and row 1 less row 0 of a book
  /// is exactly its bit's weight (4, 2 or 1) times that of the last book of its number. A group is
  /// then a fixed vector plus num_stages vectors, each multiplied by a number. Only the rows are
  /// constrained: encoding, decoding and storing are those of any codebook.
  bool graded = false;

  bool operator==(const KeyCodecConfig&) const = default;

  int num_groups() const { return pairs.num_pairs() / group_pairs; }
  /// Codes of one token and head: two (A, B) for each group and stage.
  int num_codes() const { return num_groups() * num_stages * 2; }
  /// Bits of one code.
  int code_bits() const { return bits_for(codebook_size); }
  /// Bits of one token and head, without norms.
  int bits_per_head() const { return num_codes() * code_bits(); }
  /// Norms of one token of `num_kv_heads` heads.
  int num_norms(int num_kv_heads) const { return norm_per_head ? num_kv_heads : 1; }

  /// Throws `Error` naming the first field that is out of range.
  void validate() const;

  /// The paper's 1-bit and 2-bit shapes (section 4: g = 64, Nc = 64, R = 11 and 21). A head smaller
  /// than 128 is one group, with R scaled down in proportion; a larger one is cut into groups.
  static KeyCodecConfig paper_1bit(const PairLayout& pairs) { return paper(pairs, 11); }
  static KeyCodecConfig paper_2bit(const PairLayout& pairs) { return paper(pairs, 21); }

  /// The library's own: as many stages or fewer, untied, a beam of 8 and a norm per head. Decoding
  /// costs the same. At head_dim 128 with norms 1.156 and 2.0 bits a number (R = 11 and 20).
  static KeyCodecConfig commvq_1bit(const PairLayout& pairs) { return commvq(pairs, 11); }
  static KeyCodecConfig commvq_2bit(const PairLayout& pairs) { return commvq(pairs, 20); }

  /// For attention that expands no codebook: two centroids a book, so that a key is a fixed vector
  /// plus a sum of vectors that its bits switch on, a linear code like that of the values. Groups
  /// are whole heads; codes are graded where the stages are a multiple of 4, as at head_dim 128,
  /// so that attention computes with half as many vectors as there are bits. With
  /// `ValueCodecConfig::speed_1bit`, norms and scales at head_dim 128 1.094 bits a number (R = 60),
  /// with the 2-bit ones 2.094 (R = 124).
  static KeyCodecConfig speed_1bit(const PairLayout& pairs) { return speed(pairs, 60); }
  static KeyCodecConfig speed_2bit(const PairLayout& pairs) { return speed(pairs, 124); }

 private:
  static KeyCodecConfig paper(const PairLayout& pairs, int stages_at_64_pairs);
  static KeyCodecConfig commvq(const PairLayout& pairs, int stages_at_64_pairs);
  static KeyCodecConfig speed(const PairLayout& pairs, int stages_at_64_pairs);
};

inline void KeyCodecConfig::validate() const {
  pairs.validate();
  require(group_pairs >= 1 && pairs.num_pairs() % group_pairs == 0, "group_pairs is ", group_pairs,
          "; it must divide head_dim / 2 = ", pairs.num_pairs());
  require(codebook_size >= 2 && codebook_size <= (1 << kMaxCodeBits), "codebook_size is ",
          codebook_size, "; it must be in [2, ", 1 << kMaxCodeBits, "]");
  require(num_stages >= 1 && num_stages <= 1024, "num_stages is ", num_stages,
          "; it must be in [1, 1024]");
  require(beam_width >= 1 && beam_width <= 1024, "beam_width is ", beam_width,
          "; it must be in [1, 1024]");
  if (!graded) return;
  require(codebook_size == 2, "codebook_size is ", codebook_size, "; graded codes need 2");
  require(!tied, "tied is true; graded codes need untied books");
  require(num_stages % 4 == 0, "num_stages is ", num_stages,
          "; graded codes need a multiple of 4, whose eight bits are a byte");
}

inline KeyCodecConfig KeyCodecConfig::paper(const PairLayout& pairs, int stages_at_64_pairs) {
  pairs.validate();
  KeyCodecConfig config;
  config.pairs = pairs;
  config.group_pairs = pairs.num_pairs() < 64 ? pairs.num_pairs() : 64;
  while (pairs.num_pairs() % config.group_pairs != 0) --config.group_pairs;
  const int stages = stages_at_64_pairs * config.group_pairs / 64;
  config.num_stages = stages < 1 ? 1 : stages;
  return config;
}

inline KeyCodecConfig KeyCodecConfig::commvq(const PairLayout& pairs, int stages_at_64_pairs) {
  KeyCodecConfig config = paper(pairs, stages_at_64_pairs);
  config.tied = false;
  config.beam_width = 8;
  config.norm_per_head = true;
  return config;
}

inline KeyCodecConfig KeyCodecConfig::speed(const PairLayout& pairs, int stages_at_64_pairs) {
  KeyCodecConfig config = commvq(pairs, stages_at_64_pairs);
  config.group_pairs = pairs.num_pairs();
  config.codebook_size = 2;
  config.num_stages = std::max(1, stages_at_64_pairs * pairs.num_pairs() / 64);
  config.graded = config.num_stages % 4 == 0;
  return config;
}

}  // namespace commvq
