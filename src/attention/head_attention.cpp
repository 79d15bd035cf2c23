#include "attention/head_attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/simd.hpp"

namespace commvq::attention {

using simd::IntVec;
using simd::kLanes;
using simd::Vec;

namespace {

/// So many queries at most rotate coded keys each for themselves.
constexpr int kRowsToTurnFor = 8;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

int padded(int count, int lanes = kLanes) {
  return (count + lanes - 1) / lanes * lanes;
}

/// Planar head with each half padded.
void to_padded_planar(const PairLayout& pairs, const float* channels, int padded_pairs,
                      float* planar) {
  for (int pair = 0; pair < pairs.num_pairs(); ++pair) {
    planar[pair] = channels[pairs.real_channel(pair)];
    planar[padded_pairs + pair] = channels[pairs.imag_channel(pair)];
  }
}

/// Cosines and sines `[2 * num_pairs]` to padded halves.
void to_padded_rotation(const double* rotation, int num_pairs, int padded_pairs, float* result) {
  for (int pair = 0; pair < num_pairs; ++pair) {
    result[pair] = static_cast<float>(rotation[pair]);
    result[padded_pairs + pair] = static_cast<float>(rotation[num_pairs + pair]);
  }
}

float bf16_at(const std::uint8_t* bytes) {
  std::uint16_t bits;
  std::memcpy(&bits, bytes, sizeof(bits));
  return from_bf16(bits);
}

void scale_row(float* row, int width, float factor) {
  for (int i = 0; i < width; i += kLanes) simd::store(row + i, factor * simd::load(row + i));
}

float largest_lane(Vec v) {
  float result = v[0];
  for (int i = 1; i < kLanes; ++i) result = std::max(result, v[i]);
  return result;
}

}  // namespace

Problem::Problem(const LayerCache& cache_, MatrixView<const float> queries_,
                 const AttentionOptions& options_)
    : cache(cache_),
      queries(queries_),
      options(options_),
      head_dim(cache.config().rope.pairs.head_dim),
      num_q_heads(static_cast<int>(queries.cols / head_dim)),
      group(num_q_heads / cache.config().num_kv_heads),
      padded_pairs(padded(head_dim / 2)),
      key_width(2 * padded_pairs),
      value_width(padded(head_dim)),
      code_width(padded(cache.page_layout().block_code_bits(), kCodeLanes)),
      offset_rotations(static_cast<std::size_t>(kSubtile * key_width)),
      subtile_step(static_cast<std::size_t>(head_dim)) {
  if (options.scale == 0.0f)
    options.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
  std::vector<double> rotation(static_cast<std::size_t>(head_dim));
  for (int offset = 0; offset < kSubtile; ++offset) {
    cache.rope().rotation_at(offset, rotation.data());
    to_padded_rotation(rotation.data(), head_dim / 2, padded_pairs,
                       offset_rotations.data() + offset * key_width);
  }
  cache.rope().rotation_at(kSubtile, subtile_step.data());
}

void Partial::clear(const Problem& problem, int rows) {
  const auto size = static_cast<std::size_t>(rows);
  max.assign(size, kMinusInfinity);
  sum.assign(size, 0.0f);
  codes.assign(size * static_cast<std::size_t>(problem.code_width), 0.0f);
  values.assign(size * static_cast<std::size_t>(problem.value_width), 0.0f);
}

void Partial::merge(const Partial& other, int rows) {
  const auto add_row = [](simd::LineVector<float>& into, const simd::LineVector<float>& from,
                          std::size_t row, std::size_t num_rows, float keep, float take) {
    const std::size_t width = into.size() / num_rows;
    float* const target = into.data() + row * width;
    const float* const source = from.data() + row * width;
#pragma omp simd
    for (std::size_t i = 0; i < width; ++i) target[i] = keep * target[i] + take * source[i];
  };
  for (std::size_t r = 0; r < static_cast<std::size_t>(rows); ++r) {
    const float largest = std::max(max[r], other.max[r]);
    if (largest == kMinusInfinity) continue;
    const float keep = std::exp(max[r] - largest);
    const float take = std::exp(other.max[r] - largest);
    max[r] = largest;
    sum[r] = keep * sum[r] + take * other.sum[r];
    add_row(codes, other.codes, r, max.size(), keep, take);
    add_row(values, other.values, r, max.size(), keep, take);
  }
}

HeadAttention::HeadAttention(const Problem& problem, int max_rows)
    : problem_(problem), cache_(problem.cache) {
  const auto floats = [](Index rows, Index width) {
    return simd::LineVector<float>(static_cast<std::size_t>(rows * width));
  };
  const PageLayout& layout = cache_.page_layout();
  rotation_.resize(static_cast<std::size_t>(problem.head_dim));
  float_rotation_ = floats(1, problem.key_width);
  queries_ = floats(max_rows, problem.key_width);
  unit_queries_ = floats(max_rows, problem.key_width);
  turned_ = floats(max_rows, problem.key_width);
  keys_ = floats(kSubtile, problem.key_width);
  scores_ = floats(max_rows, kTile);
  norms_ = floats(1, kTile);
  value_tile_ = floats(kTile, problem.value_width);
  channels_ = floats(1, problem.head_dim);
  planar_ = floats(1, problem.key_width);
  sums_.resize(static_cast<std::size_t>(kTile * problem.key_width));
  stream_.resize(
      static_cast<std::size_t>(bytes_for(Index{kTile} * layout.key_codes * layout.key_code_bits)) +
      sizeof(std::uint64_t));
  codes_.resize(static_cast<std::size_t>(Index{kTile} * layout.key_codes));
  bits_.resize(static_cast<std::size_t>(kTile / 8 * problem.code_width));
}

void HeadAttention::run(int head, Index first_query, int num_tokens, bool with_exact,
                        Index first_coded, Index num_coded, Partial& partial) {
  head_ = head;
  num_tokens_ = num_tokens;
  rows_ = num_tokens * problem_.group;
  partial_ = &partial;
  position_ = -1;  // no step from another item: the result must not depend on who computed that
  partial.clear(problem_, rows_);
  load_queries(first_query);
  if (with_exact) {
    run_exact(Segment::kSinks);
    run_exact(Segment::kExact);
  }
  run_coded(first_coded, num_coded);
}

/// Rotates the queries to their positions and, for coded keys, applies the tables' units.
void HeadAttention::load_queries(Index first_query) {
  first_position_ = cache_.length() - problem_.queries.rows + first_query;
  const int width = problem_.key_width;
  const int num_pairs = problem_.head_dim / 2;
  const float* const units =
      cache_.key_tables() != nullptr ? cache_.key_tables()->units(head_) : nullptr;
  for (int r = 0; r < rows_; ++r) {
    const Index token = r / problem_.group;
    const Index q_head = Index{head_} * problem_.group + r % problem_.group;
    if (r % problem_.group == 0) turn_to(first_position_ + token);
    to_padded_planar(cache_.config().rope.pairs,
                     problem_.queries.row(first_query + token) + q_head * problem_.head_dim,
                     problem_.padded_pairs, planar_.data());
    float* const query = queries_.data() + r * width;
    rotate(planar_.data(), float_rotation_.data(), problem_.padded_pairs, query);
    if (units == nullptr) continue;
    float* const unit_query = unit_queries_.data() + r * width;
    for (int pair = 0; pair < num_pairs; ++pair) {
      unit_query[pair] = query[pair] * units[pair];
      unit_query[problem_.padded_pairs + pair] = query[problem_.padded_pairs + pair] * units[pair];
    }
  }
}

/// Which tokens of a segment the query at `first_position_ + token` sees.
HeadAttention::Interval HeadAttention::visible(Segment segment, int token) const {
  const Index position = first_position_ + token;
  const Index sliding = problem_.options.sliding_window;
  const Index oldest = sliding > 0 ? std::max(Index{0}, position + 1 - sliding) : 0;
  const Index sinks = cache_.config().sinks;
  const Index coded_end = cache_.coded_end_for(position);
  if (segment == Segment::kSinks) return {oldest, std::min(sinks, position + 1)};
  if (segment == Segment::kCoded)
    return {std::max(oldest, sinks), std::min(coded_end, position + 1)};
  return {std::max(oldest, coded_end), position + 1};
}

void HeadAttention::run_exact(Segment segment) {
  const ExactStore& store = segment == Segment::kSinks ? cache_.sink_store() : cache_.exact_store();
  const Index first_stored = segment == Segment::kSinks ? 0 : cache_.exact_begin();
  const Index begin = visible(segment, 0).begin;
  const Index end = visible(segment, num_tokens_ - 1).end;
  const Index head_bytes = problem_.head_dim * size_of(store.type());
  Tile tile{};
  for (tile.first = begin; tile.first < end; tile.first += kTile) {
    tile.count = static_cast<int>(std::min(Index{kTile}, end - tile.first));
    for (int t = 0; t < tile.count; ++t) {
      const Index row = tile.first + t - first_stored;
      tile.exact_keys[static_cast<std::size_t>(t)] = store.keys(row) + head_ * head_bytes;
      tile.exact_values[static_cast<std::size_t>(t)] = store.values(row) + head_ * head_bytes;
    }
    run_tile(segment, tile);
  }
}

void HeadAttention::run_coded(Index first_coded, Index num_coded) {
  const PageLayout& layout = cache_.page_layout();
  const Index sinks = cache_.config().sinks;
  const Index head_bytes = problem_.head_dim * size_of(layout.exact_type);
  const Index begin = std::max(first_coded, visible(Segment::kCoded, 0).begin - sinks);
  const Index end =
      std::min(first_coded + num_coded, visible(Segment::kCoded, num_tokens_ - 1).end - sinks);
  Tile tile{};
  Index next = 0;
  for (Index first = begin; first < end; first = next) {
    // Tiles begin where a multiple of kTile in a page does, hence on whole bytes.
    const Index page = first / layout.page_size;
    tile.slot = first % layout.page_size / kTile * kTile;
    tile.first = sinks + page * layout.page_size + tile.slot;
    const Index in_page = std::min(Index{kTile}, layout.page_size - tile.slot);
    next = tile.first - sinks + in_page;
    tile.count = static_cast<int>(std::min(in_page, end + sinks - tile.first));
    tile.page = cache_.pages()[static_cast<std::size_t>(page)]->data();
    for (int t = 0; t < tile.count; ++t) {
      const auto at = static_cast<std::size_t>(t);
      if (!layout.keys_coded())
        tile.exact_keys[at] = tile.page + layout.exact_keys(tile.slot + t) + head_ * head_bytes;
      if (!layout.values_coded())
        tile.exact_values[at] = tile.page + layout.exact_values(tile.slot + t) + head_ * head_bytes;
    }
    run_tile(Segment::kCoded, tile);
  }
}

void HeadAttention::run_tile(Segment segment, const Tile& tile) {
  const PageLayout& layout = cache_.page_layout();
  score_tile(tile, tile.page != nullptr && layout.keys_coded());
  bool any_visible = false;
  for (int row = 0; row < rows_; ++row) any_visible |= weigh_row(segment, tile, row);
  if (!any_visible) return;
  if (tile.page != nullptr && layout.values_coded()) {
    gather_coded_values(tile);
  } else {
    gather_exact_values(tile);
  }
}

/// Scores of all tokens, without norms and scale.
void HeadAttention::score_tile(const Tile& tile, bool keys_coded) {
  const int width = problem_.key_width;
  const simd::LineVector<float>& queries = keys_coded ? unit_queries_ : queries_;
  const bool turn_on_the_way = keys_coded && rows_ <= kRowsToTurnFor;
  std::fill(norms_.begin(), norms_.end(), 1.0f);
  if (keys_coded) load_coded_keys(tile);
  for (int first = 0; first < tile.count; first += kSubtile) {
    turn_to(tile.first + first);
    for (int r = 0; r < rows_; ++r)
      rotate_back(queries.data() + r * width, float_rotation_.data(), problem_.padded_pairs,
                  turned_.data() + r * width);
    const std::int16_t* const sums = sums_.data() + first * width;
    if (turn_on_the_way) {
      score_turning_subtile(turned_.data(), rows_, sums, problem_.offset_rotations.data(),
                            problem_.padded_pairs, scores_.data() + first);
      continue;
    }
    const int count = std::min(kSubtile, tile.count - first);
    if (keys_coded) {
      turn_coded_keys(sums, count);
    } else {
      load_exact_keys(tile, first, count);
    }
    score_subtile(turned_.data(), rows_, keys_.data(), width, scores_.data() + first);
  }
}

/// The tile's norms, and its decoded keys in units of the key tables, before rotation.
void HeadAttention::load_coded_keys(const Tile& tile) {
  const PageLayout& layout = cache_.page_layout();
  const Index token_bits = Index{layout.key_codes} * layout.key_code_bits;
  std::memcpy(stream_.data(), tile.page + layout.key_stream(head_) + tile.slot * token_bits / 8,
              static_cast<std::size_t>(bytes_for(tile.count * token_bits)));
  unpack_codes(stream_.data(), layout.key_code_bits, Index{tile.count} * layout.key_codes,
               codes_.data());
  sum_rows(*cache_.key_tables(), head_, codes_.data(), tile.count, problem_.padded_pairs,
           sums_.data(), row_scratch_);
  for (int t = 0; t < tile.count; ++t)
    norms_[static_cast<std::size_t>(t)] =
        bf16_at(tile.page + layout.key_norm(tile.slot + t, head_));
}

void HeadAttention::turn_coded_keys(const std::int16_t* sums, int count) {
  const int width = problem_.key_width;
  for (int t = 0; t < count; ++t)
    rotate(sums + t * width, problem_.offset_rotations.data() + t * width, problem_.padded_pairs,
           keys_.data() + t * width);
}

void HeadAttention::load_exact_keys(const Tile& tile, int first, int count) {
  for (int t = 0; t < count; ++t) {
    widen_floats(tile.exact_keys[static_cast<std::size_t>(first + t)], problem_.head_dim,
                 cache_.config().exact_type, channels_.data());
    to_padded_planar(cache_.config().rope.pairs, channels_.data(), problem_.padded_pairs,
                     planar_.data());
    rotate(planar_.data(), problem_.offset_rotations.data() + t * problem_.key_width,
           problem_.padded_pairs, keys_.data() + t * problem_.key_width);
  }
}

/// Makes `float_rotation_` that of `position`: one step from the last one where it fits, which
/// costs no trigonometry and loses about 1e-16 a step.
void HeadAttention::turn_to(Index position) {
  const int num_pairs = problem_.head_dim / 2;
  if (position == position_) return;
  if (position == position_ + kSubtile && position_ >= 0) {
    Rope::rotate_planar(rotation_.data(), problem_.subtile_step.data(), num_pairs);
  } else {
    cache_.rope().rotation_at(position, rotation_.data());
  }
  position_ = position;
  to_padded_rotation(rotation_.data(), num_pairs, problem_.padded_pairs, float_rotation_.data());
}

/// Turns a row of scores into weights e^{score - max} and brings what the row has gathered to the
/// new maximum. False, and zero weights, if the row sees no token of the tile.
bool HeadAttention::weigh_row(Segment segment, const Tile& tile, int row) {
  float* const scores = scores_.data() + Index{row} * kTile;
  const Interval interval = visible(segment, row / problem_.group);
  const int begin =
      static_cast<int>(std::clamp(interval.begin - tile.first, Index{0}, Index{kTile}));
  const int end =
      static_cast<int>(std::clamp(interval.end - tile.first, Index{0}, Index{tile.count}));
  if (begin >= end) {
    std::fill(scores, scores + kTile, 0.0f);
    return false;
  }
  constexpr IntVec kIota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Vec largest = simd::broadcast(kMinusInfinity);
  for (int t = 0; t < kTile; t += kLanes) {
    Vec score = simd::load(scores + t) * simd::load(norms_.data() + t) * problem_.options.scale;
    if (const float cap = problem_.options.soft_cap; cap > 0.0f)
      for (int lane = 0; lane < kLanes; ++lane) score[lane] = cap * std::tanh(score[lane] / cap);
    const IntVec token = kIota + t;
    score = ((token >= begin) & (token < end)) ? score : simd::broadcast(kMinusInfinity);
    largest = largest > score ? largest : score;
    simd::store(scores + t, score);
  }

  const auto at = static_cast<std::size_t>(row);
  const float old_max = partial_->max[at];
  const float new_max = std::max(old_max, largest_lane(largest));
  Vec sum{};
  for (int t = 0; t < kTile; t += kLanes) {
    const Vec weight = simd::exp_nonpositive(simd::load(scores + t) - new_max);
    simd::store(scores + t, weight);
    sum += weight;
  }
  if (new_max > old_max && old_max != kMinusInfinity) {
    const float factor = std::exp(old_max - new_max);
    partial_->sum[at] *= factor;
    scale_row(partial_->codes.data() + Index{row} * problem_.code_width, problem_.code_width,
              factor);
    scale_row(partial_->values.data() + Index{row} * problem_.value_width, problem_.value_width,
              factor);
  }
  partial_->max[at] = new_max;
  partial_->sum[at] += simd::sum_of_lanes(sum);
  return true;
}

void HeadAttention::gather_coded_values(const Tile& tile) {
  const PageLayout& layout = cache_.page_layout();
  const int block = layout.value_block(head_), code_bits = layout.block_code_bits();
  float scales[kTile] = {};
  for (int t = 0; t < tile.count; ++t)
    scales[t] = bf16_at(tile.page + layout.value_scale(tile.slot + t, block));
  for (int r = 0; r < rows_; ++r)
    for (int t = 0; t < kTile; t += kLanes) {
      float* const weights = scores_.data() + Index{r} * kTile + t;
      simd::store(weights, simd::load(weights) * simd::load(scales + t));
    }
  const int num_bytes = (tile.count + 7) / 8;
  const std::uint8_t* bytes = tile.page + layout.value_bits(tile.slot) + block * code_bits;
  Index byte_stride = layout.value_code_bits;
  if (code_bits != problem_.code_width) {
    for (Index i = 0; i < num_bytes; ++i)
      std::memcpy(bits_.data() + i * problem_.code_width, bytes + i * byte_stride,
                  static_cast<std::size_t>(code_bits));
    bytes = bits_.data();
    byte_stride = problem_.code_width;
  }
  add_code_bits(bytes, byte_stride, num_bytes, problem_.code_width, scores_.data(), rows_,
                partial_->codes.data(), problem_.code_width);
}

void HeadAttention::gather_exact_values(const Tile& tile) {
  for (int t = 0; t < tile.count; ++t)
    widen_floats(tile.exact_values[static_cast<std::size_t>(t)], problem_.head_dim,
                 cache_.config().exact_type, value_tile_.data() + t * problem_.value_width);
  add_values(value_tile_.data(), tile.count, problem_.value_width, scores_.data(), rows_,
             partial_->values.data(), problem_.value_width);
}

}  // namespace commvq::attention
