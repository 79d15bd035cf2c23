#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "commvq/cache/exact_store.hpp"
#include "commvq/cache/key_tables.hpp"
#include "commvq/cache/page.hpp"
#include "commvq/core/export.h"
#include "commvq/core/float16.hpp"
#include "commvq/core/view.hpp"
#include "commvq/io/codebook_file.hpp"
#include "commvq/rope/rope.hpp"

namespace commvq {

/// Most tokens of one sequence, and the largest window and number of sinks: far beyond any memory,
/// and small enough that no sum of positions overflows.
inline constexpr Index kMaxTokens = Index{1} << 48;

/// What a cache stores exactly, and how.
struct COMMVQ_API CacheConfig {
  RopeConfig rope;       ///< of the model; also gives head_dim and the pair layout
  int num_kv_heads = 1;  ///< at least 1
  /// A query reads the newest `window` tokens, itself included, exactly; in [0, kMaxTokens].
  Index window = 128;
  /// The first `sinks` tokens of the sequence stay exact for good; in [0, kMaxTokens].
  Index sinks = 0;
  FloatType exact_type = FloatType::kBf16;  ///< of every exact copy
  Index page_size = 64;                     ///< tokens per page of codes; a positive multiple of 8

  bool operator==(const CacheConfig&) const = default;

  /// Channels of one token's keys, and of its values: num_kv_heads * head_dim.
  Index num_channels() const { return Index{num_kv_heads} * rope.pairs.head_dim; }

  /// Throws `Error` naming the first field that is out of range.
  void validate() const;
};

/// Where the parts of a layer's cache begin and end, in tokens; see `LayerCache`.
struct LayerExtent {
  Index length = 0;
  Index exact_begin = 0;
  Index exact_floor = 0;  ///< where exact copies began when nothing had been dropped since
  Index coded_end = 0;

  bool operator==(const LayerExtent&) const = default;
};

/// Compressed keys and values of one layer of one sequence.
///
/// Tokens are numbered from 0. The first `sinks` tokens live in an exact buffer of their own. Of
/// the others `[sinks, coded_end)` are coded, in pages, and `[exact_begin, length)` have an exact
/// copy; the ranges overlap: exact_begin <= coded_end and coded_end >= length - window (as long as
/// there are fewer tokens than sinks, both begin at `sinks`). Tokens are coded from their rounded
/// exact copies, a block at a time and ahead of need, so that the encoders' weights are read once a
/// block.
///
/// A query at position t reads exact copies of tokens above t - window and codes of older ones,
/// however the tokens were grouped into calls of `append` (see `coded_end_for`). Keys are stored
/// before RoPE; attention applies it.
///
/// Copying is `fork()`: pages are shared until one of the copies writes to them. Different caches,
/// forks included, may be used from different threads; one cache by one thread at a time.
class COMMVQ_API LayerCache {
 public:
  /// A null side of `codec` is kept in `exact_type` in the pages. Throws `Error` if the
  /// configuration is invalid or the codec's shapes differ from it.
  LayerCache(const CacheConfig& config, LayerCodec codec);

  /// The cache whose parts these are: what `extent`, `sink_store`, `exact_store` and `pages` of a
  /// cache with the same configuration and codec gave, for instance before it was saved. The parts
  /// need not be trusted: throws `Error` if they do not fit each other, for a code beyond its
  /// codebook, and for NaN and infinity.
  LayerCache(const CacheConfig& config, LayerCodec codec, const LayerExtent& extent,
             ExactStore sink_store, ExactStore exact_store, std::vector<PagePtr> pages);

  const CacheConfig& config() const { return config_; }
  const LayerCodec& codec() const { return codec_; }
  const Rope& rope() const { return rope_; }

  /// Adds tokens at positions `[length(), length() + keys.rows)`. `keys` and `values` are
  /// `[tokens][num_kv_heads * head_dim]`, channel order, keys before RoPE; both are rounded to
  /// `exact_type`. Throws `Error` for shapes that do not fit, for NaN and infinity and for numbers
  /// beyond the range of `exact_type` or of the codec, and for more than kMaxTokens tokens in all;
  /// the cache is then unchanged, as it is when memory runs out. Adding no
  /// tokens does nothing. Exact copies of at least the newest `window + keys.rows - 1` tokens
  /// remain, so long prompts should be added in chunks.
  void append(MatrixView<const float> keys, MatrixView<const float> values);

  /// Tokens in the cache.
  Index length() const { return length_; }

  /// Keeps the first `length` tokens. Throws `Error` unless it is in `[0, length()]`. Exact copies
  /// that were already dropped do not come back: tokens below `exact_begin()` stay coded for every
  /// later query, even if they fall into its window.
  void truncate(Index length);
  void clear() { truncate(0); }

  /// A copy that shares the pages.
  LayerCache fork() const { return *this; }

  /// Bits of one coded token, all heads, keys and values, norms and scales: exactly what a page
  /// allocates for it.
  Index bits_per_token() const;
  double bytes_per_token() const { return static_cast<double>(bits_per_token()) / 8.0; }
  /// Bytes of pages and exact buffers. A shared page counts in every cache that holds it.
  Index allocated_bytes() const;

  /// Which tokens a query at `position` reads as codes: those in `[sinks_end(), result)`. Equals
  /// position + 1 - window, limited to what is coded and to what has no exact copy any more.
  Index coded_end_for(Index position) const;
  /// The oldest position that may be queried: that of the first token of the last `append`, or
  /// older. An older query would find codes of tokens that its window owes it exactly.
  Index first_query_position() const;

  /// Writes what a query at `query_position` sees of tokens `[first, first + keys.rows)`: decoded
  /// or exact keys and values `[tokens][num_kv_heads * head_dim]`, channel order, keys before RoPE.
  /// Throws `Error` for shapes and ranges that do not fit and for a position that may not be
  /// queried.
  void decode_tokens(Index query_position, Index first, MatrixView<float> keys,
                     MatrixView<float> values) const;

  /// End of the sink tokens: min(sinks, length()).
  Index sinks_end() const;
  Index exact_begin() const { return exact_begin_; }
  Index coded_end() const { return coded_end_; }

  LayerExtent extent() const { return {length_, exact_begin_, exact_floor_, coded_end_}; }

  /// Storage, for the attention kernels.
  const KeyTables* key_tables() const { return key_tables_.get(); }  ///< null for exact keys
  const PageLayout& page_layout() const { return page_layout_; }
  const std::vector<PagePtr>& pages() const {
    return pages_;
  }  ///< token sinks + i: page i / page_size
  const ExactStore& sink_store() const { return sink_store_; }  ///< row i is token i
  const ExactStore& exact_store() const {
    return exact_store_;
  }  ///< row i is token exact_begin() + i

 private:
  void code_up_to(Index end);
  void read_exact(Index first, MatrixView<float> keys, MatrixView<float> values) const;
  Page& writable_page(Index page);

  CacheConfig config_;
  LayerCodec codec_;
  std::shared_ptr<const KeyTables> key_tables_;
  Rope rope_;
  PageLayout page_layout_;
  Index length_ = 0;
  Index exact_begin_ = 0;
  Index exact_floor_ = 0;
  Index coded_end_ = 0;
  ExactStore sink_store_;
  ExactStore exact_store_;
  std::vector<PagePtr> pages_;
};

/// Compressed keys and values of all layers of one sequence.
class COMMVQ_API Cache {
 public:
  /// One codec per layer. Throws `Error` for no layers or shapes that do not fit.
  Cache(const CacheConfig& config, std::vector<LayerCodec> codecs);
  /// The cache of these layers. Throws `Error` for none or different configurations.
  explicit Cache(std::vector<LayerCache> layers);

  int num_layers() const { return static_cast<int>(layers_.size()); }
  /// Throws `Error` unless `layer` is in `[0, num_layers())`.
  LayerCache& layer(int layer);
  const LayerCache& layer(int layer) const;

  /// Tokens that every layer holds: the shortest layer's length (layers differ while a model step
  /// is under way).
  Index length() const;
  /// Truncates every layer. Throws `Error`, and changes nothing, unless `length` is in
  /// `[0, length()]`.
  void truncate(Index length);
  void clear();
  /// A copy that shares the pages.
  Cache fork() const { return *this; }
  Index allocated_bytes() const;

 private:
  std::vector<LayerCache> layers_;
};

}  // namespace commvq
