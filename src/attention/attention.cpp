#include "commvq/attention/attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "commvq/core/parallel_errors.hpp"

#include <omp.h>

#include "attention/head_attention.hpp"
#include "attention/tile_kernels.hpp"
#include "core/divide_up.hpp"

namespace commvq {
namespace {

using attention::HeadAttention;
using attention::Partial;
using attention::Problem;

/// Spans of coded tokens of one query, at most; and the fewest tokens of a span.
constexpr Index kMaxParts = 16;
constexpr Index kMinPartTokens = 1024;
/// Query heads times tokens that share the expansion of a tile.
constexpr Index kBlockRows = 128;
/// Work items whose partial results are in memory at once.
constexpr Index kBatchItems = 64;

Index round_up(Index value, Index unit) {
  return (value + unit - 1) / unit * unit;
}

/// How the work is cut. Depends on shapes alone, so that the result does not depend on threads.
struct Schedule {
  Index block_tokens;
  Index num_blocks;
  Index num_parts;
  Index part_tokens;

  Schedule(const LayerCache& cache, Index num_queries, int group) {
    block_tokens = std::clamp(kBlockRows / group, Index{1}, num_queries);
    num_blocks = divide_up(num_queries, block_tokens);
    const Index coded = cache.coded_end() - cache.config().sinks;
    const Index most = std::max(Index{1}, kMaxParts / num_queries);
    const Index smallest = std::max(kMinPartTokens, divide_up(coded, most));
    part_tokens = round_up(smallest, cache.config().page_size);
    num_parts = std::max(Index{1}, divide_up(coded, part_tokens));
  }
};

void require_attendable(const LayerCache& cache, MatrixView<const float> queries,
                        MatrixView<const float> output) {
  const int head_dim = cache.config().rope.pairs.head_dim;
  const Index channels = cache.config().num_channels();
  require(queries.cols > 0 && queries.cols % channels == 0, "queries have ", queries.cols,
          " channels; expected a multiple of num_kv_heads * head_dim = ",
          cache.config().num_kv_heads, " * ", head_dim);
  require(output.rows == queries.rows && output.cols == queries.cols, "the output is [",
          output.rows, ", ", output.cols, "]; expected [", queries.rows, ", ", queries.cols, "]");
  require(queries.rows >= 1, "attention needs at least one query");
  require(queries.rows <= cache.length(), queries.rows, " queries on a cache of ", cache.length(),
          " tokens: append the queries' own keys and values first");
  const Index first = cache.length() - queries.rows;
  require(first >= cache.first_query_position(), queries.rows, " queries begin at position ", first,
          "; exact tokens are retained for those from ", cache.first_query_position(),
          ": attend after each append");
  for (Index i = 0; i < queries.rows; ++i)
    for (Index channel = 0; channel < queries.cols; ++channel)
      require(std::isfinite(queries(i, channel)), "query ", i, ", channel ", channel, " is ",
              queries(i, channel), "; it must be finite");
}

/// Merges the parts of one query block and KV head and writes its rows of the output.
void finish(const Problem& problem, std::vector<Partial>& partials, std::size_t first_partial,
            Index num_parts, Index first_query, int rows, int head, MatrixView<float> output,
            float* lse) {
  Partial& total = partials[first_partial];
  for (Index part = 1; part < num_parts; ++part)
    total.merge(partials[first_partial + static_cast<std::size_t>(part)], rows);
  if (problem.cache.page_layout().values_coded()) {
    const PageLayout& layout = problem.cache.page_layout();
    const int block = layout.value_block(head), code_bits = layout.block_code_bits();
    const auto decoder =
        problem.cache.codec().values->decoder().middle_rows(Index{block} * code_bits, code_bits);
    const Index first_channel = Index{head} * problem.head_dim - block * decoder.cols;
    attention::add_decoded(decoder.data + first_channel, decoder.row_stride, decoder.rows,
                           problem.head_dim, total.codes.data(), problem.code_width, rows,
                           total.values.data(), problem.value_width);
  }
  for (int r = 0; r < rows; ++r) {
    const Index query = first_query + r / problem.group;
    const Index q_head = Index{head} * problem.group + r % problem.group;
    const auto at = static_cast<std::size_t>(r);
    const float* const sum = total.values.data() + Index{r} * problem.value_width;
    float* const out = output.row(query) + q_head * problem.head_dim;
    for (int d = 0; d < problem.head_dim; ++d) out[d] = sum[d] / total.sum[at];
    if (lse != nullptr)
      lse[query * problem.num_q_heads + q_head] = total.max[at] + std::log(total.sum[at]);
  }
}

/// Throws for scores, or sums of values, that no float holds.
void require_no_overflow(MatrixView<const float> output, Index head_dim) {
  for (Index i = 0; i < output.rows; ++i)
    for (Index channel = 0; channel < output.cols; ++channel)
      if (!std::isfinite(output(i, channel)))
        fail("attention of query ", i, ", head ", channel / head_dim, " is ", output(i, channel),
             ": its scores or values are beyond float's range, 3.4e38; scale queries, keys or ",
             "values down");
}

}  // namespace

void AttentionOptions::validate() const {
  require(std::isfinite(scale), "scale is ", scale, "; it must be finite");
  require(sliding_window >= 0, "sliding_window is ", sliding_window, "; it must not be negative");
  require(std::isfinite(soft_cap) && soft_cap >= 0.0f, "soft_cap is ", soft_cap,
          "; it must be finite and not negative");
}

void attend(const LayerCache& cache, MatrixView<const float> queries,
            const AttentionOptions& options, MatrixView<float> output, float* lse) {
  options.validate();
  require_attendable(cache, queries, output);
  const Problem problem(cache, queries, options);
  const Schedule schedule(cache, queries.rows, problem.group);
  const Index num_heads = cache.config().num_kv_heads;
  const Index batch_blocks =
      std::clamp(kBatchItems / (num_heads * schedule.num_parts), Index{1}, schedule.num_blocks);
  const int block_rows = static_cast<int>(schedule.block_tokens) * problem.group;

  std::vector<Partial> partials(
      static_cast<std::size_t>(batch_blocks * num_heads * schedule.num_parts));
  std::vector<HeadAttention> workers(static_cast<std::size_t>(omp_get_max_threads()),
                                     HeadAttention(problem, block_rows));

  for (Index first_block = 0; first_block < schedule.num_blocks; first_block += batch_blocks) {
    const Index last_block = std::min(first_block + batch_blocks, schedule.num_blocks);
    const Index num_pairs = (last_block - first_block) * num_heads;  // (query block, KV head)
    const auto first_query_of = [&](Index pair) {
      return (first_block + pair / num_heads) * schedule.block_tokens;
    };
    const auto tokens_from = [&](Index first_query) {
      return static_cast<int>(std::min(schedule.block_tokens, queries.rows - first_query));
    };
    ParallelErrors errors;
#pragma omp parallel
    {
      HeadAttention& worker = workers[static_cast<std::size_t>(omp_get_thread_num())];
#pragma omp for schedule(dynamic)
      for (Index item = 0; item < num_pairs * schedule.num_parts; ++item) {
        // Heads side by side: value codes, which heads of a block share, then stay in the second
        // cache level.
        const Index pair = item % num_pairs;
        const Index part = item / num_pairs;
        const Index first_query = first_query_of(pair);
        errors.guard([&] {
          worker.run(static_cast<int>(pair % num_heads), first_query, tokens_from(first_query),
                     part == 0, part * schedule.part_tokens, schedule.part_tokens,
                     partials[static_cast<std::size_t>(pair * schedule.num_parts + part)]);
        });
      }
#pragma omp for schedule(dynamic)
      for (Index pair = 0; pair < num_pairs; ++pair) {
        const Index first_query = first_query_of(pair);
        errors.guard([&] {
          finish(problem, partials, static_cast<std::size_t>(pair * schedule.num_parts),
                 schedule.num_parts, first_query, tokens_from(first_query) * problem.group,
                 static_cast<int>(pair % num_heads), output, lse);
        });
      }
    }
    errors.rethrow();
  }
  require_no_overflow(output, problem.head_dim);
}

}  // namespace commvq
