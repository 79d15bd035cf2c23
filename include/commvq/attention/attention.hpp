#pragma once

#include "commvq/cache/cache.hpp"
#include "commvq/core/export.h"
#include "commvq/core/view.hpp"

namespace commvq {

/// How scores become weights.
struct COMMVQ_API AttentionOptions {
  float scale = 0.0f;        ///< of the scores; 0 stands for 1 / sqrt(head_dim)
  Index sliding_window = 0;  ///< a query sees the newest so many tokens, itself included; 0: all
  float soft_cap = 0.0f;     ///< scores become cap * tanh(score / cap); 0: none

  /// Throws `Error` naming the first field that is out of range.
  void validate() const;
};

/// Causal attention of the newest `queries.rows` positions over a compressed cache that already
/// holds them: row i stands at position cache.length() - queries.rows + i.
///
/// `queries` is `[positions][num_q_heads * head_dim]`, channel order, before RoPE; num_q_heads is a
/// multiple of num_kv_heads, and query head h reads KV head h / (num_q_heads / num_kv_heads).
/// `output` has the same shape. `lse`, `[positions][num_q_heads]` or null, receives the natural
/// logarithm of the sum of the exponentials of the scores.
///
/// Codes are expanded in tiles that stay in the first cache level; a decoded cache never exists.
/// Parallel over query blocks, KV heads and spans of tokens; the result does not depend on the
/// number of threads.
///
/// Throws `Error` for shapes that do not fit, no queries, an empty cache, NaN or infinity in the
/// queries, for more queries than `cache.first_query_position()` allows, and where scores or sums
/// overflow, which leaves the output written; a result is finite.
COMMVQ_API void attend(const LayerCache& cache, MatrixView<const float> queries,
                       const AttentionOptions& options, MatrixView<float> output,
                       float* lse = nullptr);

}  // namespace commvq
