#pragma once

#include <memory>

#include "commvq/cache/cache.hpp"

namespace engine {

using commvq::Index;
using commvq::MatrixView;

/// Keys and values of one sequence that are kept elsewhere than in a `commvq::Cache`.
class SequenceCache {
 public:
  virtual ~SequenceCache() = default;
  /// Adds new tokens of one layer and attends with their queries: queries and `attended` are
  /// `[tokens][num_q_heads * head_dim]`, keys and values `[tokens][num_kv_heads * head_dim]`, all
  /// before RoPE. A query sees the newest `sliding_window` tokens, itself included; 0: all.
  virtual void append_and_attend(int layer, MatrixView<const float> queries,
                                 MatrixView<const float> keys, MatrixView<const float> values,
                                 Index sliding_window, MatrixView<float> attended) = 0;
  /// Tokens that every layer holds.
  virtual Index length() const = 0;
  /// Bytes of pages and exact copies of all layers.
  virtual Index allocated_bytes() const = 0;
  /// The same sequence once more, to go on with in another way. Throws `commvq::Error` for kinds
  /// that cannot.
  virtual std::unique_ptr<SequenceCache> fork() const;
};

/// The cache of a sequence, of either kind. Does not own it.
class CacheHandle {
 public:
  CacheHandle() = default;
  CacheHandle(commvq::Cache* cache) : host_(cache) {}
  CacheHandle(commvq::Cache& cache) : host_(&cache) {}
  CacheHandle(SequenceCache* cache) : other_(cache) {}
  CacheHandle(SequenceCache& cache) : other_(&cache) {}

  void append_and_attend(int layer, MatrixView<const float> queries, MatrixView<const float> keys,
                         MatrixView<const float> values, Index sliding_window,
                         MatrixView<float> attended) const;

 private:
  commvq::Cache* host_ = nullptr;
  SequenceCache* other_ = nullptr;
};

}  // namespace engine
