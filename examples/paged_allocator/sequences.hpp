#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <vector>

#include "paged_allocator/block_pool.hpp"

namespace paged {

/// Pages of one layer: block b lies at `data + b * stride`. The memory may be a device's.
struct LayerPages {
  std::uint8_t* data = nullptr;
  Index stride = 0;      ///< bytes, at least page_bytes
  Index page_bytes = 0;  ///< bytes of a page that hold anything
};

/// Copies bytes: `std::memcpy`, or `cudaMemcpyAsync` with `cudaMemcpyDefault` on the engine's
/// stream.
using CopyBytes = std::function<void(void* to, const void* from, Index bytes)>;

/// Block tables of many sequences over shared pages, for engines that keep codes in pages: prefix
/// sharing, copy on write, chunked prefill, truncation, swapping to host memory and back.
///
/// A step of the engine: `reserve` room for the next tokens, code them at `slots` (the
/// `slot_mapping` of `cuda::append`), `commit` them, attend with `block_table`. Where `reserve`
/// says no, swap out or remove a sequence and try again. Not thread safe.
class Sequences {
 public:
  using Id = Index;

  /// Blocks hold `page_size` tokens in each of `layers`. Throws `commvq::Error` for sizes that are
  /// not positive and for pages that overlap.
  Sequences(int num_blocks, int page_size, std::vector<LayerPages> layers, CopyBytes copy);

  /// A sequence that begins with the longest run of full blocks known to hold the beginning of
  /// `prompt`, less than all of it: somebody must compute the last token's logits. `length(id)`
  /// says how many tokens need no prefill.
  Id add(std::span<const int> prompt);
  /// A sequence with the same tokens in the same blocks.
  Id fork(Id id);
  void remove(Id id);

  /// Makes room for the next `count` tokens; copies a block that others use too before it is
  /// written to. False if there are not enough blocks; nothing has changed then. Throws
  /// `commvq::Error` for a sequence that is swapped out.
  [[nodiscard]] bool reserve(Id id, Index count);
  /// Places of the next `count` tokens: block * page_size + place in the block. Room must have been
  /// reserved.
  std::vector<std::int64_t> slots(Id id, Index count) const;
  /// Counts tokens that were written to their slots; full blocks can be found from now on.
  void commit(Id id, std::span<const int> tokens);
  /// Keeps the first `length` tokens.
  void truncate(Id id, Index length);

  /// Copies the sequence's pages to host memory and gives up its blocks.
  void swap_out(Id id);
  /// The reverse, byte for byte; blocks that still hold the same tokens are shared again. False if
  /// there are not enough blocks; nothing has changed then.
  [[nodiscard]] bool swap_in(Id id);
  bool is_swapped_out(Id id) const { return at(id).swapped_out; }

  Index length(Id id) const { return static_cast<Index>(at(id).tokens.size()); }
  /// Page of each `page_size` tokens, as `cuda::DecodeAttention::block_table` wants it.
  const std::vector<std::int32_t>& block_table(Id id) const { return at(id).blocks; }
  const BlockPool& pool() const { return pool_; }
  int page_size() const { return page_size_; }
  /// Bytes of one block in all layers.
  Index block_bytes() const;

 private:
  struct Sequence {
    std::vector<int> tokens;
    std::vector<std::int32_t> blocks;  ///< enough for the tokens, more where room is reserved
    std::vector<Index> names;          ///< of the contents of full blocks, in order
    bool swapped_out = false;
    std::vector<std::uint8_t> swapped;  ///< [blocks][layers] pages
  };

  Sequence& at(Id id);
  const Sequence& at(Id id) const;
  Sequence& in_memory(Id id);
  std::vector<int> block_tokens(const Sequence& sequence, std::size_t block) const;
  Index name_before(const Sequence& sequence, std::size_t block) const;
  void copy_block(int to, int from);
  void release_blocks(Sequence& sequence, std::size_t keep);

  int page_size_;
  std::vector<LayerPages> layers_;
  CopyBytes copy_;
  BlockPool pool_;
  std::map<Id, Sequence> sequences_;
  Id last_id_ = 0;
};

}  // namespace paged
