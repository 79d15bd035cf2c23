#include "paged_allocator/block_pool.hpp"

#include "commvq/core/error.hpp"

namespace paged {

BlockPool::BlockPool(int num_blocks) {
  commvq::require(num_blocks >= 1, "a pool of ", num_blocks, " blocks; it must have at least 1");
  blocks_.resize(static_cast<std::size_t>(num_blocks));
  for (int block = num_blocks - 1; block >= 0; --block) free_.push_back(block);
}

BlockPool::Block& BlockPool::in_use(int block) {
  commvq::require(block >= 0 && block < num_blocks(), "block ", block, " of a pool of ",
                  num_blocks());
  Block& result = blocks_[static_cast<std::size_t>(block)];
  commvq::require(result.users > 0, "block ", block, " is not in use");
  return result;
}

std::optional<int> BlockPool::allocate() {
  if (free_.empty()) {
    if (unused_.empty()) return std::nullopt;
    const int oldest = unused_.front();
    unused_.pop_front();
    unpublish(oldest);
    free_.push_back(oldest);
    ++num_evictions_;
  }
  const int block = free_.back();
  free_.pop_back();
  blocks_[static_cast<std::size_t>(block)].users = 1;
  return block;
}

void BlockPool::retain(int block) {
  ++in_use(block).users;
}

void BlockPool::release(int block) {
  Block& released = in_use(block);
  if (--released.users > 0) return;
  if (released.name == 0) {
    free_.push_back(block);
  } else {
    released.place = unused_.insert(unused_.end(), block);
  }
}

Index BlockPool::publish(int block, Index before, const std::vector<int>& tokens) {
  Block& published = in_use(block);
  commvq::require(published.name == 0, "block ", block, " has a name already");
  const auto [entry, is_new] = named_.try_emplace({before, tokens}, Found{block, last_name_ + 1});
  if (!is_new) return entry->second.name;
  published.name = ++last_name_;
  published.entry = entry;
  return published.name;
}

void BlockPool::unpublish(int block) {
  Block& published = blocks_.at(static_cast<std::size_t>(block));
  if (published.name == 0) return;
  named_.erase(published.entry);
  published.name = 0;
}

std::optional<BlockPool::Found> BlockPool::find(Index before, const std::vector<int>& tokens) {
  const auto found = named_.find({before, tokens});
  if (found == named_.end()) return std::nullopt;
  Block& block = blocks_[static_cast<std::size_t>(found->second.block)];
  if (block.users++ == 0) unused_.erase(block.place);
  return found->second;
}

}  // namespace paged
