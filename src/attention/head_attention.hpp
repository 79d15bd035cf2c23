#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "commvq/attention/attention.hpp"

#include "attention/simd.hpp"
#include "attention/tile_kernels.hpp"

namespace commvq::attention {

/// What all work items of one call share.
struct Problem {
  const LayerCache& cache;
  MatrixView<const float> queries;
  AttentionOptions options;  ///< with the scale that applies
  int head_dim;
  int num_q_heads;
  int group;         ///< query heads of a KV head
  int padded_pairs;  ///< num_pairs and ...
  int key_width;     ///< ... planar heads, padded to whole vectors: 2 * padded_pairs
  int value_width;   ///< head_dim padded
  int code_width;    ///< value code bits of a block padded; 0 if values are exact
  simd::LineVector<float>
      offset_rotations;              ///< `[kSubtile][key_width]`: rotations by 0, 1, ... tokens
  std::vector<double> subtile_step;  ///< `[2 * num_pairs]`: rotation by kSubtile tokens

  Problem(const LayerCache& cache, MatrixView<const float> queries,
          const AttentionOptions& options);
};

/// What some queries gathered over a span of tokens: for each row (token-major, then query heads of
/// one KV head), with weights e^{score - max}, their sum, the weighted sum of value codes and that
/// of exact values.
struct Partial {
  simd::LineVector<float> max;     ///< `[rows]`, minus infinity if nothing was visible
  simd::LineVector<float> sum;     ///< `[rows]`
  simd::LineVector<float> codes;   ///< `[rows][code_width]`
  simd::LineVector<float> values;  ///< `[rows][value_width]`

  /// Nothing gathered, for `rows` rows. The thread that fills a partial result also allocates it.
  void clear(const Problem& problem, int rows);
  /// Adds what the same queries gathered over other tokens.
  void merge(const Partial& other, int rows);
};

/// Attention of some consecutive queries over a span of tokens, for the query heads of one KV head.
/// One object serves one thread at a time and keeps its scratch memory between items.
class HeadAttention {
 public:
  HeadAttention(const Problem& problem, int max_rows);

  /// Gathers, for `num_tokens` queries from `first_query` on, coded tokens
  /// `[first_coded, first_coded + num_coded)`, counted from the end of the sinks, and if
  /// `with_exact` also sinks and the exact window.
  void run(int head, Index first_query, int num_tokens, bool with_exact, Index first_coded,
           Index num_coded, Partial& partial);

 private:
  enum class Segment { kSinks, kCoded, kExact };
  struct Interval {
    Index begin;
    Index end;
  };
  /// Up to kTile tokens. Each side either lies in `page` as codes or is read through pointers to
  /// the head's exact numbers.
  struct Tile {
    Index first;  ///< token
    int count;
    const std::uint8_t* page;  ///< null for tokens that are not in pages
    Index slot;                ///< of the first token in its page
    std::array<const std::uint8_t*, kTile> exact_keys;
    std::array<const std::uint8_t*, kTile> exact_values;
  };

  void load_queries(Index first_query);
  Interval visible(Segment segment, int token) const;
  void run_exact(Segment segment);
  void run_coded(Index first_coded, Index num_coded);
  void run_tile(Segment segment, const Tile& tile);
  void score_tile(const Tile& tile, bool keys_coded);
  void load_coded_keys(const Tile& tile);
  void turn_coded_keys(const std::int16_t* sums, int count);
  void load_exact_keys(const Tile& tile, int first, int count);
  void turn_to(Index position);
  bool weigh_row(Segment segment, const Tile& tile, int row);
  void gather_coded_values(const Tile& tile);
  void gather_exact_values(const Tile& tile);

  const Problem& problem_;
  const LayerCache& cache_;
  int head_ = 0;
  int rows_ = 0;
  int num_tokens_ = 0;
  Index first_position_ = 0;
  Partial* partial_ = nullptr;

  // The rotation at position_, exact in double, and rounded.
  Index position_ = -1;
  std::vector<double> rotation_;            // [2 * num_pairs]
  simd::LineVector<float> float_rotation_;  // [key_width]

  simd::LineVector<float> queries_;       // [rows][key_width], planar, rotated to their positions
  simd::LineVector<float> unit_queries_;  // the same times the units of the key tables
  simd::LineVector<float> turned_;  // [rows][key_width], rotated back to a subtile's first token
  simd::LineVector<float> keys_;    // [kSubtile][key_width]
  simd::LineVector<float> scores_;  // [rows][kTile], then weights
  simd::LineVector<float> norms_;   // [kTile]
  simd::LineVector<float> value_tile_;   // [kTile][value_width]
  simd::LineVector<float> channels_;     // [head_dim]
  simd::LineVector<float> planar_;       // [key_width]
  simd::LineVector<std::int16_t> sums_;  // [kTile][key_width]
  RowScratch row_scratch_;
  std::vector<std::uint8_t> stream_;  // codes of one tile, padded
  std::vector<std::uint16_t> codes_;  // [kTile][key_codes]
  std::vector<std::uint8_t> bits_;    // [kTile / 8][code_width]
};

}  // namespace commvq::attention
