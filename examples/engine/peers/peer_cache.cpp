#include "engine/peers/peer_cache.hpp"

#include <algorithm>
#include <cmath>

#include "commvq/core/float16.hpp"

#include <Eigen/Core>
#include <omp.h>

namespace engine {
namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Strided = Eigen::Map<const Matrix, 0, Eigen::OuterStride<>>;

void append_rows(std::vector<float>& to, MatrixView<const float> rows) {
  for (Index t = 0; t < rows.rows; ++t) to.insert(to.end(), rows.row(t), rows.row(t) + rows.cols);
}

/// `rows` rounded to FP16.
std::vector<float> rounded(MatrixView<const float> rows) {
  std::vector<float> result;
  append_rows(result, rows);
  for (float& x : result) x = commvq::from_fp16(commvq::to_fp16(x));
  return result;
}

/// Codes `rows` and puts what they decode to in their place.
void round_trip(const PeerCodec* codec, MatrixView<float> rows) {
  if (codec != nullptr) codec->decode(codec->encode(rows), rows);
}

Index block_of(const PeerCodec* codec) {
  return codec != nullptr ? codec->block_tokens() : 1;
}

/// The tokens that the queries of one head attend over, `[tokens][head_dim]` each.
struct HeadTokens {
  Strided keys, values, coded_keys, coded_values;
};

/// Softmax attention of `queries`, `[count][head_dim]` rotated and scaled, which stand at positions
/// from `first` on. A query at position p reads tokens below p + 1 - window as codes.
Matrix attend_head(const Matrix& queries, Index first, Index window, const HeadTokens& tokens) {
  const Index count = queries.rows(), end = first + count;
  const Index coded_end = std::max<Index>(0, end - window);          // of the last query
  const Index exact_begin = std::max<Index>(0, first + 1 - window);  // of the first query
  Matrix coded = queries * tokens.coded_keys.topRows(coded_end).transpose();
  Matrix exact = queries * tokens.keys.middleRows(exact_begin, end - exact_begin).transpose();
  Eigen::VectorXf sums(count);
  for (Index i = 0; i < count; ++i) {
    const Index boundary = std::max<Index>(0, first + i + 1 - window);
    auto old = coded.row(i).head(boundary).array();
    auto recent = exact.row(i).segment(boundary - exact_begin, first + i + 1 - boundary).array();
    const float largest =
        boundary > 0 ? std::max(old.maxCoeff(), recent.maxCoeff()) : recent.maxCoeff();
    old = (old - largest).exp();
    recent = (recent - largest).exp();
    sums[i] = old.sum() + recent.sum();
    coded.row(i).tail(coded_end - boundary).setZero();
    exact.row(i).head(boundary - exact_begin).setZero();
    exact.row(i).tail(count - 1 - i).setZero();
  }
  Matrix result = exact * tokens.values.middleRows(exact_begin, end - exact_begin);
  result.noalias() += coded * tokens.coded_values.topRows(coded_end);
  result.array().colwise() /= sums.array();
  return result;
}

}  // namespace

void code_keys(const PeerLayer& layer, const commvq::Rope& rope, Index first_position,
               MatrixView<float> keys) {
  if (layer.keys_after_rope) rope.apply(keys, first_position);
  round_trip(layer.keys.get(), keys);
  if (!layer.keys_after_rope) rope.apply(keys, first_position);
}

PeerCache::PeerCache(const ModelConfig& config, std::vector<PeerLayer> layers, Index window,
                     Index sinks)
    : rope_(config.rope),
      num_channels_(config.kv_size()),
      peers_(std::move(layers)),
      window_(window),
      sinks_(sinks),
      layers_(peers_.size()) {
  commvq::require(static_cast<int>(peers_.size()) == config.num_layers, "peers for ", peers_.size(),
                  " layers; the model has ", config.num_layers);
  commvq::require(sinks >= 0, "sinks is ", sinks, "; it must not be negative");
  for (const PeerLayer& peer : peers_) {
    const Index block = std::max(block_of(peer.keys.get()), block_of(peer.values.get()));
    commvq::require(window >= block, "a window of ", window,
                    " exact tokens is too small for a codec that codes ", block, " together");
  }
}

void PeerCache::code_new_keys(const PeerLayer& peer, Layer& layer) const {
  const Index block = block_of(peer.keys.get());
  const Index coded = static_cast<Index>(layer.coded_keys.size()) / num_channels_;
  const Index count = (layer.length - coded) / block * block;
  if (count == 0) return;
  const MatrixView<float> keys(layer.waiting_keys.data(), count, num_channels_);
  code_keys(peer, rope_, coded, keys);
  const Index exact = std::clamp<Index>(sinks_ - coded, 0, count);
  std::copy_n(layer.keys.data() + coded * num_channels_, exact * num_channels_, keys.data);
  append_rows(layer.coded_keys, keys);
  layer.waiting_keys.erase(layer.waiting_keys.begin(),
                           layer.waiting_keys.begin() + count * num_channels_);
}

void PeerCache::code_new_values(const PeerLayer& peer, Layer& layer) const {
  const Index block = block_of(peer.values.get());
  const Index coded = static_cast<Index>(layer.coded_values.size()) / num_channels_;
  const Index count = (layer.length - coded) / block * block;
  const float* const first = layer.values.data() + coded * num_channels_;
  std::vector<float> values(first, first + count * num_channels_);
  round_trip(peer.values.get(), {values.data(), count, num_channels_});
  const Index exact = std::clamp<Index>(sinks_ - coded, 0, count);
  std::copy_n(first, exact * num_channels_, values.data());
  layer.coded_values.insert(layer.coded_values.end(), values.begin(), values.end());
}

void PeerCache::append(const PeerLayer& peer, MatrixView<const float> keys,
                       MatrixView<const float> values, Layer& layer) const {
  std::vector<float> new_keys = rounded(keys);
  layer.waiting_keys.insert(layer.waiting_keys.end(), new_keys.begin(), new_keys.end());
  rope_.apply(MatrixView<float>(new_keys.data(), keys.rows, num_channels_), layer.length);
  layer.keys.insert(layer.keys.end(), new_keys.begin(), new_keys.end());
  const std::vector<float> new_values = rounded(values);
  layer.values.insert(layer.values.end(), new_values.begin(), new_values.end());
  layer.length += keys.rows;
  code_new_keys(peer, layer);
  code_new_values(peer, layer);
}

void PeerCache::append_and_attend(int layer_index, MatrixView<const float> queries,
                                  MatrixView<const float> keys, MatrixView<const float> values,
                                  Index sliding_window, MatrixView<float> attended) {
  commvq::require(sliding_window == 0, "a sliding window of ", sliding_window,
                  " tokens: other methods' caches attend over all tokens only");
  commvq::require(keys.cols == num_channels_ && values.cols == num_channels_,
                  "keys and values have ", keys.cols, " and ", values.cols,
                  " channels; the cache has ", num_channels_);
  const auto at = static_cast<std::size_t>(layer_index);
  Layer& layer = layers_.at(at);
  append(peers_[at], keys, values, layer);

  const Index head_dim = rope_.pairs().head_dim, num_q_heads = queries.cols / head_dim;
  const Index per_kv_head = num_q_heads / (num_channels_ / head_dim);
  const Index first = layer.length - queries.rows;
  std::vector<float> rotated;
  append_rows(rotated, queries);
  rope_.apply(MatrixView<float>(rotated.data(), queries.rows, queries.cols), first);
  const auto head_of = [&](const std::vector<float>& rows, Index channel) {
    return Strided(rows.empty() ? nullptr : rows.data() + channel,
                   static_cast<Index>(rows.size()) / num_channels_, head_dim,
                   Eigen::OuterStride<>(num_channels_));
  };
#pragma omp parallel for if (!omp_in_parallel())
  for (Index head = 0; head < num_q_heads; ++head) {
    const Matrix of_head = Strided(rotated.data() + head * head_dim, queries.rows, head_dim,
                                   Eigen::OuterStride<>(queries.cols)) /
                           std::sqrt(static_cast<float>(head_dim));
    const Index channel = head / per_kv_head * head_dim;
    const Matrix result =
        attend_head(of_head, first, window_,
                    {head_of(layer.keys, channel), head_of(layer.values, channel),
                     head_of(layer.coded_keys, channel), head_of(layer.coded_values, channel)});
    for (Index i = 0; i < queries.rows; ++i)
      std::copy_n(result.row(i).data(), head_dim, attended.row(i) + head * head_dim);
  }
}

Index PeerCache::length() const {
  Index shortest = layers_[0].length;
  for (const Layer& layer : layers_) shortest = std::min(shortest, layer.length);
  return shortest;
}

Index PeerCache::allocated_bytes() const {
  std::size_t numbers = 0;
  for (const Layer& layer : layers_)
    numbers += layer.keys.capacity() + layer.values.capacity() + layer.coded_keys.capacity() +
               layer.coded_values.capacity() + layer.waiting_keys.capacity();
  return static_cast<Index>(numbers * sizeof(float));
}

}  // namespace engine
