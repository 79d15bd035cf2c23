#include <algorithm>
#include <bit>
#include <climits>
#include <cmath>
#include <type_traits>

#include "commvq/cuda/decode_attention.hpp"

#include "common/launch.cuh"
#include "decode_attention/combine.cuh"
#include "decode_attention/kernels.cuh"
#include "decode_attention/value_sums.cuh"

namespace commvq::cuda {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

__global__ void __launch_bounds__(ValueSumsConfig::kThreads, 1)
    value_sums_kernel(const __grid_constant__ Problem problem) {
  extern __shared__ __align__(128) std::uint8_t memory[];
  value_sums::run(problem, memory);
}

int divide_up(int value, int unit) {
  return (value + unit - 1) / unit;
}

/// Coded tokens that are scored in the time that one exact token takes.
int exact_cost(const CodebooksView& view) {
  if (view.layout.is_binary()) return ExactConfig::kCostInBinary;
  const KeySlice& slice = view.slices[0];
  const int rows = slice.row_bits == 8 ? slice.num_books
                                       : KeySlice::narrow_groups(slice.num_books) *
                                             ExactConfig::kRowsOfThreeGroups / 3;
  return std::max(1, ExactConfig::kCostInRows / (rows + ExactConfig::kCodedCostInRows));
}
/// Pieces of a query's exact tokens: all warps of the blocks that score no keys have some, or of
/// all blocks.
int exact_pieces(const CodebooksView& view, const Problem& p) {
  const int blocks = p.num_exact_blocks > 0 ? p.num_exact_blocks : view.num_multiprocessors;
  const int items = p.num_kv_heads * divide_up(p.group, ExactConfig::rows(p.head_dim)) *
                    p.num_query_tokens * p.batch;
  return std::clamp(blocks * ExactConfig::kWarps / items, 1, ExactConfig::kMaxPieces);
}

/// Fills in what depends on shapes alone.
Problem problem_of(const CodebooksView& view, const DecodeLimits& limits) {
  Problem p{};
  p.turns = view.turns;
  p.channels = view.channels;
  const DevicePageLayout& layout = view.layout;
  p.page = {layout.page_size,
            static_cast<int>(std::bit_width(static_cast<unsigned>(layout.page_size))) - 1,
            layout.num_code_bits,
            layout.value_codes_offset,
            layout.key_norms_offset,
            layout.value_scales_offset,
            layout.norms_per_token > 1 ? 2 * layout.page_size : 0,
            layout.value_blocks > 1 ? 2 * layout.page_size : 0};
  p.batch = limits.batch;
  p.num_query_tokens = limits.num_query_tokens;
  p.num_kv_heads = view.layout.num_kv_heads;
  p.head_dim = view.layout.head_dim;
  p.group = limits.num_q_heads / p.num_kv_heads;
  p.rows_per_head = p.group * p.num_query_tokens;
  p.num_rows = p.num_kv_heads * p.rows_per_head;
  p.row_stride = divide_up(p.num_rows, 8) * 8;
  // A sequence may begin and end within a block.
  p.max_workspace_blocks =
      (limits.total_tokens + kBlockTokens - 1) / kBlockTokens + Index{2} * limits.batch;
  const bool binary = view.layout.is_binary();
  const int row_blocks =
      divide_up(p.rows_per_head, binary ? BinaryAttentionConfig::kRows : KeyScoresConfig::kMaxRows);
  p.num_key_parts = std::max(1, view.num_multiprocessors / (p.num_kv_heads * row_blocks));
  p.num_exact_blocks =
      std::max(0, view.num_multiprocessors - p.num_kv_heads * p.num_key_parts * row_blocks);
  p.num_exact_pieces = exact_pieces(view, p);
  p.exact_cost = exact_cost(view);
  p.num_sums = layout.num_value_sums();
  const int chunks = divide_up(p.page.num_code_bits, ValueSumsConfig::kChunkBits);
  p.num_value_parts = std::max(
      1, view.num_multiprocessors / (chunks * divide_up(p.num_rows, ValueSumsConfig::kRows)));
  p.num_combine_blocks = 1;
  if (binary) {
    p.num_value_parts = p.num_key_parts;
    return p;
  }
  // A block for each chunk where there are few rows; with many, as many as run at once.
  const int row_blocks_in_all = p.batch * p.num_kv_heads * combine::row_blocks(p);
  p.num_combine_blocks =
      std::clamp(2 * view.num_multiprocessors / row_blocks_in_all, 1, combine::num_chunks(p));
  if (p.num_combine_blocks > 1) p.num_counters = row_blocks_in_all;
  return p;
}

/// Hands out pieces of the workspace, each on 256 bytes; without memory it only counts.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<std::uint8_t*>(memory)) {}
  template <class T>
  T* take(Index count) {
    T* const piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return piece;
  }
  std::size_t used() const { return used_; }

 private:
  std::uint8_t* memory_;
  std::size_t used_ = 0;
};

/// Places the intermediate results; returns the bytes they take.
std::size_t place(Problem& p, const CodebooksView& view, void* memory) {
  Workspace workspace(memory);
  // Attention over binary codes passes nothing from block to block.
  const Index blocks = view.layout.is_binary() ? 0 : p.max_workspace_blocks;
  const Index parts = Index{p.num_value_parts} + p.batch;
  const Index batch_rows = Index{p.batch} * p.num_rows;
  p.weights = workspace.take<std::uint32_t>(blocks * p.row_stride * 16);
  p.block_sums = workspace.take<RowSum>(blocks * p.row_stride);
  p.raw_scores =
      workspace.take<float>(view.num_slices > 1 ? blocks * p.row_stride * kBlockTokens : 0);
  p.value_sums = workspace.take<float>(parts * p.row_stride * p.num_sums);
  p.part_sums = workspace.take<RowSum>(parts * p.row_stride);
  p.exact_outputs = workspace.take<float>(batch_rows * p.num_exact_pieces * p.head_dim);
  p.exact_sums = workspace.take<RowSum>(batch_rows * p.num_exact_pieces);
  p.block_outputs = workspace.take<float>(Index{p.num_counters} * CombineConfig::kRows *
                                          p.num_combine_blocks * p.head_dim);
  p.counters = workspace.take<std::uint32_t>(p.num_counters);
  return workspace.used();
}

Status invalid(const char* what, long long value, const char* limit) {
  return {StatusCode::kInvalidArgument, "%s is %lld; %s", what, value, limit};
}

Status check_limits(const CodebooksView& view, const DecodeLimits& limits) {
  const int heads = view.layout.num_kv_heads;
  if (limits.batch < 1 || limits.batch > 65535)
    return invalid("batch", limits.batch, "it must be in [1, 65535]");
  if (limits.num_query_tokens < 1 || limits.num_query_tokens > 16)
    return invalid("num_query_tokens", limits.num_query_tokens, "it must be in [1, 16]");
  if (limits.num_q_heads < heads || limits.num_q_heads % heads != 0)
    return {StatusCode::kInvalidArgument,
            "num_q_heads is %d; it must be a multiple of the %d KV heads", limits.num_q_heads,
            heads};
  if (limits.num_q_heads / heads > kMaxGroup)
    return {StatusCode::kUnsupported,
            "%d query heads for each of %d KV heads; at most %d are supported",
            limits.num_q_heads / heads, heads, kMaxGroup};
  if (limits.total_tokens < 1 || limits.total_tokens > (Index{1} << 35))
    return invalid("total_tokens", limits.total_tokens, "it must be in [1, 2^35]");
  return {};
}

Status check_exact(const DecodeAttention& call) {
  const ExactTokens& exact = call.exact;
  if (exact.capacity < 0 || exact.sinks < 0)
    return invalid("exact.capacity or exact.sinks", std::min(exact.capacity, exact.sinks),
                   "it must not be negative");
  if (exact.capacity == 0) {
    if (call.window > 0 || exact.sinks > 0)
      return {StatusCode::kInvalidArgument,
              "window is %d and sinks %d, but exact.capacity is 0: exact tokens need memory",
              call.window, exact.sinks};
    return {};
  }
  if (exact.keys == nullptr || exact.values == nullptr || call.exact_slots == nullptr)
    return {StatusCode::kInvalidArgument,
            "exact.keys, exact.values and exact_slots must not be null with capacity %d",
            exact.capacity};
  if (exact.type != FloatType::kBf16 && exact.type != FloatType::kFp16)
    return {StatusCode::kUnsupported, "exact tokens are %s; bf16 and fp16 are supported",
            name_of(exact.type)};
  if (exact.capacity < call.window + call.limits.num_query_tokens - 1)
    return {StatusCode::kInvalidArgument,
            "exact.capacity is %d; window %d and %d query tokens need window + tokens - 1",
            exact.capacity, call.window, call.limits.num_query_tokens};
  return {};
}

Status check_call(const DeviceCodebooks& codebooks, const DecodeAttention& call) {
  const DevicePageLayout& layout = codebooks.layout();
  if (layout.num_planes == 0)
    return {StatusCode::kInvalidArgument, "the codebooks are empty; make them with prepare()"};
  if (Status status = check_limits(codebooks.view(), call.limits); !status.ok()) return status;
  if (call.queries == nullptr || call.output == nullptr || call.pages.data == nullptr ||
      call.block_table == nullptr || call.seq_lens == nullptr)
    return {StatusCode::kInvalidArgument,
            "queries, output, pages, block_table and seq_lens must not be null"};
  if (call.type != FloatType::kBf16 && call.type != FloatType::kFp16)
    return {StatusCode::kUnsupported, "queries are %s; bf16 and fp16 are supported",
            name_of(call.type)};
  if (call.pages.page_stride < layout.page_bytes || call.pages.page_stride % 16 != 0 ||
      reinterpret_cast<std::uintptr_t>(call.pages.data) % 16 != 0)
    return {
        StatusCode::kInvalidArgument,
        "page_stride is %lld; it must be a multiple of 16 and at least %lld, and the pages must "
        "lie on 16 bytes",
        static_cast<long long>(call.pages.page_stride), static_cast<long long>(layout.page_bytes)};
  if (call.max_blocks < 1) return invalid("max_blocks", call.max_blocks, "it must be at least 1");
  if (call.window < 0 || call.sliding_window < 0)
    return invalid("window or sliding_window", std::min(call.window, call.sliding_window),
                   "it must not be negative");
  if (!std::isfinite(call.scale) || !(call.soft_cap >= 0) || !std::isfinite(call.soft_cap))
    return {StatusCode::kInvalidArgument,
            "scale is %g and soft_cap %g; both must be finite, soft_cap not negative",
            static_cast<double>(call.scale), static_cast<double>(call.soft_cap)};
  if (Status status = check_exact(call); !status.ok()) return status;
  const std::size_t needed = decode_workspace_size(codebooks, call.limits);
  if (call.workspace == nullptr || call.workspace_bytes < needed ||
      reinterpret_cast<std::uintptr_t>(call.workspace) % 256 != 0)
    return {StatusCode::kWorkspaceTooSmall,
            "the workspace has %zu bytes; %zu are needed, on 256 bytes", call.workspace_bytes,
            needed};
  return {};
}

Problem problem_of(const DeviceCodebooks& codebooks, const DecodeAttention& call) {
  Problem p = problem_of(codebooks.view(), call.limits);
  place(p, codebooks.view(), call.workspace);
  p.queries = call.queries;
  p.output = call.output;
  p.lse = call.lse;
  p.type = call.type;
  p.pages = call.pages.data;
  p.page_stride = call.pages.page_stride;
  p.block_table = call.block_table;
  p.max_blocks = call.max_blocks;
  p.seq_lens = call.seq_lens;
  p.exact = call.exact;
  p.exact_slots = call.exact_slots;
  p.exact_begin = call.exact_begin;
  p.window = call.window;
  p.sliding_window = call.sliding_window > 0 ? call.sliding_window : INT_MAX;
  const float scale = call.scale != 0 ? call.scale : 1 / std::sqrt(static_cast<float>(p.head_dim));
  p.score_scale = scale * kLog2E;
  p.soft_cap = call.soft_cap * kLog2E;
  return p;
}

KeyScoresLauncher launcher_of(const KeySlice& slice, int rows_per_head) {
  const int tiles =
      std::min(divide_up(rows_per_head, KeyScoresConfig::kTileRows), KeyScoresConfig::kTiles);
  return slice.row_bits == 8
             ? byte_rows_launcher(slice.width, tiles)
             : narrow_rows_launcher(KeySlice::narrow_groups(slice.num_books), tiles);
}

KeyCodes codes_of(const DevicePageLayout& layout, const KeyPlane& plane) {
  return {plane.num_books, layout.code_bits,   layout.codebook_size, plane.num_words,
          plane.tail_bits, plane.words_offset, plane.tails_offset};
}

key_scores::Turn turn_of(int slice, int num_slices) {
  if (num_slices == 1) return key_scores::Turn::kOnly;
  if (slice == 0) return key_scores::Turn::kFirst;
  return slice + 1 == num_slices ? key_scores::Turn::kLast : key_scores::Turn::kMiddle;
}

cudaError_t score_keys(const CodebooksView& view, const Problem& p, cudaStream_t stream) {
  const int row_blocks = divide_up(p.rows_per_head, KeyScoresConfig::kMaxRows);
  for (int i = 0; i < view.num_slices; ++i) {
    const KeySlice& slice = view.slices[i];
    const dim3 grid(p.num_kv_heads * p.num_key_parts + (i == 0 ? p.num_exact_blocks : 0),
                    row_blocks);
    key_scores::Arguments arguments{p, slice, turn_of(i, view.num_slices), {}};
    for (int plane = 0; plane < view.layout.planes_at_once; ++plane)
      arguments.codes[plane] = codes_of(view.layout, view.layout.planes[slice.plane + plane]);
    const cudaError_t error = launcher_of(slice, p.rows_per_head)(
        arguments, grid, key_scores::shared_bytes(slice), stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t attend_binary(const CodebooksView& view, const Problem& p, cudaStream_t stream) {
  return launch_binary_attention({p, view.binary, codes_of(view.layout, view.layout.planes[0])},
                                 view.decoder, stream);
}

cudaError_t sum_values(const Problem& p, cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(
      value_sums_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, value_sums::kSharedBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(p.num_value_parts, divide_up(p.page.num_code_bits, ValueSumsConfig::kChunkBits),
                  divide_up(p.num_rows, ValueSumsConfig::kRows));
  return launch_early(value_sums_kernel, grid, ValueSumsConfig::kThreads, value_sums::kSharedBytes,
                      stream, p);
}

cudaError_t combine_parts(const CodebooksView& view, const Problem& p, cudaStream_t stream) {
  using namespace combine;
  if (p.head_dim == 64) return launch<SharedSums<64>>(p, view.decoder, stream);
  if (p.head_dim == 128) return launch<SharedSums<128>>(p, view.decoder, stream);
  return launch<SharedSums<256>>(p, view.decoder, stream);
}

}  // namespace

std::size_t decode_workspace_size(const DeviceCodebooks& codebooks, const DecodeLimits& limits) {
  if (!check_limits(codebooks.view(), limits).ok()) return 0;
  Problem p = problem_of(codebooks.view(), limits);
  return place(p, codebooks.view(), nullptr);
}

Status decode_attention(const DeviceCodebooks& codebooks, const DecodeAttention& call) noexcept {
  if (Status status = check_call(codebooks, call); !status.ok()) return status;
  const Problem p = problem_of(codebooks, call);
  const CodebooksView& view = codebooks.view();
  cudaError_t error = cudaSuccess;
  if (view.layout.is_binary()) {
    error = attend_binary(view, p, call.stream);
  } else {
    error = score_keys(view, p, call.stream);
    if (error == cudaSuccess) error = sum_values(p, call.stream);
    if (error == cudaSuccess) error = combine_parts(view, p, call.stream);
  }
  if (error != cudaSuccess)
    return {StatusCode::kCudaError, "launching decode attention: %s", cudaGetErrorString(error)};
  return {};
}

}  // namespace commvq::cuda
