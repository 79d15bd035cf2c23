#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "commvq/core/view.hpp"

namespace paged {

using commvq::Index;

/// Counts who uses which block of a fixed number, and remembers what full blocks hold, so that
/// another sequence with the same beginning finds them. A block nobody uses keeps its contents
/// until it is needed for something else, the one unused longest first.
///
/// A block stands for one page in every layer; what pages hold is no concern of this class. Not
/// thread safe: a scheduler owns it.
class BlockPool {
 public:
  /// Throws `commvq::Error` unless `num_blocks` is positive.
  explicit BlockPool(int num_blocks);

  /// A block for one user, its contents undefined; none if all are in use. Forgets contents that
  /// nobody uses where no block is free otherwise.
  std::optional<int> allocate();
  /// One user more, or one less, of a block in use. Throws `commvq::Error` for other blocks.
  void retain(int block);
  void release(int block);
  int num_users(int block) const { return blocks_.at(static_cast<std::size_t>(block)).users; }

  /// Names the contents of a block: `tokens` after contents `before` (0: at the beginning). Returns
  /// their name, which is never 0. If another block holds the same, that one keeps the name and
  /// this block stays unnamed.
  Index publish(int block, Index before, const std::vector<int>& tokens);
  /// Takes the name away, before the block is written to.
  void unpublish(int block);
  bool is_published(int block) const {
    return blocks_.at(static_cast<std::size_t>(block)).name != 0;
  }

  struct Found {
    int block;
    Index name;
  };
  /// The block with these contents, now with one user more.
  std::optional<Found> find(Index before, const std::vector<int>& tokens);

  int num_blocks() const { return static_cast<int>(blocks_.size()); }
  /// Blocks that `allocate` can still hand out: empty ones, and those whose contents nobody uses.
  int num_available() const { return static_cast<int>(free_.size() + unused_.size()); }
  /// Of those, blocks whose contents can still be found.
  int num_remembered() const { return static_cast<int>(unused_.size()); }
  /// Contents that were forgotten to make room.
  Index num_evictions() const { return num_evictions_; }

 private:
  using Contents = std::pair<Index, std::vector<int>>;
  struct Block {
    int users = 0;
    Index name = 0;                               ///< 0: none
    std::map<Contents, Found>::iterator entry{};  ///< where it has a name
    std::list<int>::iterator place{};             ///< in unused_, where it has a name and no users
  };
  Block& in_use(int block);

  std::vector<Block> blocks_;
  std::vector<int> free_;
  std::list<int> unused_;  ///< named blocks without users, the one unused longest first
  std::map<Contents, Found> named_;
  Index last_name_ = 0;
  Index num_evictions_ = 0;
};

}  // namespace paged
