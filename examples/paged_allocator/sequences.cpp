#include "paged_allocator/sequences.hpp"

#include <algorithm>
#include <utility>

#include "commvq/core/error.hpp"

namespace paged {

using commvq::require;

Sequences::Sequences(int num_blocks, int page_size, std::vector<LayerPages> layers, CopyBytes copy)
    : page_size_(page_size), layers_(std::move(layers)), copy_(std::move(copy)), pool_(num_blocks) {
  require(page_size >= 1, "page_size is ", page_size, "; it must be at least 1");
  for (const LayerPages& layer : layers_)
    require(layer.page_bytes >= 1 && layer.stride >= layer.page_bytes, "pages of ",
            layer.page_bytes, " bytes lie ", layer.stride, " bytes apart; they would overlap");
}

Sequences::Sequence& Sequences::at(Id id) {
  const auto found = sequences_.find(id);
  require(found != sequences_.end(), "there is no sequence ", id);
  return found->second;
}

const Sequences::Sequence& Sequences::at(Id id) const {
  const auto found = sequences_.find(id);
  require(found != sequences_.end(), "there is no sequence ", id);
  return found->second;
}

Sequences::Sequence& Sequences::in_memory(Id id) {
  Sequence& sequence = at(id);
  require(!sequence.swapped_out, "sequence ", id, " is swapped out; swap it in first");
  return sequence;
}

Index Sequences::block_bytes() const {
  Index bytes = 0;
  for (const LayerPages& layer : layers_) bytes += layer.page_bytes;
  return bytes;
}

/// Tokens of a full block.
std::vector<int> Sequences::block_tokens(const Sequence& sequence, std::size_t block) const {
  const auto begin = sequence.tokens.begin() + static_cast<Index>(block) * page_size_;
  return {begin, begin + page_size_};
}

Index Sequences::name_before(const Sequence& sequence, std::size_t block) const {
  return block == 0 ? 0 : sequence.names[block - 1];
}

void Sequences::copy_block(int to, int from) {
  for (const LayerPages& layer : layers_)
    copy_(layer.data + to * layer.stride, layer.data + from * layer.stride, layer.page_bytes);
}

/// The last blocks first: of contents that nobody uses, ends are forgotten before beginnings,
/// without which they could not be found.
void Sequences::release_blocks(Sequence& sequence, std::size_t keep) {
  while (sequence.blocks.size() > keep) {
    pool_.release(sequence.blocks.back());
    sequence.blocks.pop_back();
  }
}

Sequences::Id Sequences::add(std::span<const int> prompt) {
  Sequence sequence;
  while (static_cast<Index>(sequence.tokens.size()) + page_size_ <
         static_cast<Index>(prompt.size())) {
    const auto next = prompt.subspan(sequence.tokens.size(), static_cast<std::size_t>(page_size_));
    const auto found = pool_.find(name_before(sequence, sequence.blocks.size()),
                                  std::vector<int>(next.begin(), next.end()));
    if (!found) break;
    sequence.blocks.push_back(found->block);
    sequence.names.push_back(found->name);
    sequence.tokens.insert(sequence.tokens.end(), next.begin(), next.end());
  }
  sequences_[++last_id_] = std::move(sequence);
  return last_id_;
}

Sequences::Id Sequences::fork(Id id) {
  Sequence copy = in_memory(id);
  for (const int block : copy.blocks) pool_.retain(block);
  sequences_[++last_id_] = std::move(copy);
  return last_id_;
}

void Sequences::remove(Id id) {
  release_blocks(at(id), 0);
  sequences_.erase(id);
}

bool Sequences::reserve(Id id, Index count) {
  require(count >= 0, "room for ", count, " tokens");
  Sequence& sequence = in_memory(id);
  const Index length = static_cast<Index>(sequence.tokens.size());
  const auto needed = static_cast<std::size_t>((length + count + page_size_ - 1) / page_size_);
  const auto partial = static_cast<std::size_t>(length / page_size_);
  const auto is_shared = [&](std::size_t i) {
    return i < sequence.blocks.size() && pool_.num_users(sequence.blocks[i]) > 1;
  };
  // Only blocks that tokens will be written to need be the sequence's own.
  std::size_t copies = 0;
  for (std::size_t i = partial; i < needed; ++i) copies += is_shared(i);
  const std::size_t more = needed - std::min(needed, sequence.blocks.size());
  if (static_cast<std::size_t>(pool_.num_available()) < copies + more) return false;
  for (std::size_t i = partial; i < std::min(needed, sequence.blocks.size()); ++i) {
    if (is_shared(i)) {
      const int own = *pool_.allocate();
      copy_block(own, sequence.blocks[i]);
      pool_.release(std::exchange(sequence.blocks[i], own));
    } else {
      pool_.unpublish(sequence.blocks[i]);
    }
  }
  while (sequence.blocks.size() < needed) sequence.blocks.push_back(*pool_.allocate());
  return true;
}

std::vector<std::int64_t> Sequences::slots(Id id, Index count) const {
  const Sequence& sequence = at(id);
  const Index length = static_cast<Index>(sequence.tokens.size());
  require(count >= 0 && !sequence.swapped_out &&
              length + count <= static_cast<Index>(sequence.blocks.size()) * page_size_,
          "slots of ", count, " tokens after ", length, ": only ", sequence.blocks.size(),
          " blocks of ", page_size_, " are reserved");
  std::vector<std::int64_t> result;
  for (Index t = length; t < length + count; ++t) {
    const int block = sequence.blocks[static_cast<std::size_t>(t / page_size_)];
    require(pool_.num_users(block) == 1, "block ", block, " of sequence ", id,
            " has other users; reserve room after a fork");
    result.push_back(Index{block} * page_size_ + t % page_size_);
  }
  return result;
}

void Sequences::commit(Id id, std::span<const int> tokens) {
  Sequence& sequence = in_memory(id);
  require(static_cast<Index>(sequence.tokens.size() + tokens.size()) <=
              static_cast<Index>(sequence.blocks.size()) * page_size_,
          tokens.size(), " tokens after ", sequence.tokens.size(), ": only ",
          sequence.blocks.size(), " blocks of ", page_size_, " are reserved");
  sequence.tokens.insert(sequence.tokens.end(), tokens.begin(), tokens.end());
  const std::size_t full = sequence.tokens.size() / static_cast<std::size_t>(page_size_);
  for (std::size_t i = sequence.names.size(); i < full; ++i)
    sequence.names.push_back(
        pool_.publish(sequence.blocks[i], name_before(sequence, i), block_tokens(sequence, i)));
}

void Sequences::truncate(Id id, Index length) {
  Sequence& sequence = in_memory(id);
  require(length >= 0 && length <= static_cast<Index>(sequence.tokens.size()), "truncation to ",
          length, " of ", sequence.tokens.size(), " tokens");
  sequence.tokens.resize(static_cast<std::size_t>(length));
  sequence.names.resize(
      std::min(sequence.names.size(), static_cast<std::size_t>(length / page_size_)));
  release_blocks(sequence, static_cast<std::size_t>((length + page_size_ - 1) / page_size_));
}

void Sequences::swap_out(Id id) {
  Sequence& sequence = in_memory(id);
  const Index length = static_cast<Index>(sequence.tokens.size());
  release_blocks(sequence, static_cast<std::size_t>((length + page_size_ - 1) / page_size_));
  sequence.swapped.resize(sequence.blocks.size() * static_cast<std::size_t>(block_bytes()));
  std::uint8_t* to = sequence.swapped.data();
  for (const int block : sequence.blocks)
    for (const LayerPages& layer : layers_) {
      copy_(to, layer.data + block * layer.stride, layer.page_bytes);
      to += layer.page_bytes;
    }
  release_blocks(sequence, 0);
  sequence.swapped_out = true;
}

bool Sequences::swap_in(Id id) {
  Sequence& sequence = at(id);
  require(sequence.swapped_out, "sequence ", id, " is not swapped out");
  const std::size_t full = sequence.tokens.size() / static_cast<std::size_t>(page_size_);
  const std::size_t count = (sequence.tokens.size() + static_cast<std::size_t>(page_size_) - 1) /
                            static_cast<std::size_t>(page_size_);
  std::vector<Index> names;
  std::swap(names, sequence.names);
  for (std::size_t i = 0; i < full; ++i) {
    const auto found = pool_.find(name_before(sequence, i), block_tokens(sequence, i));
    if (!found) break;
    sequence.blocks.push_back(found->block);
    sequence.names.push_back(found->name);
  }
  const std::size_t shared = sequence.blocks.size();
  if (static_cast<std::size_t>(pool_.num_available()) < count - shared) {
    release_blocks(sequence, 0);
    sequence.names = std::move(names);
    return false;
  }
  const std::uint8_t* from =
      sequence.swapped.data() + shared * static_cast<std::size_t>(block_bytes());
  for (std::size_t i = shared; i < count; ++i) {
    sequence.blocks.push_back(*pool_.allocate());
    for (const LayerPages& layer : layers_) {
      copy_(layer.data + sequence.blocks[i] * layer.stride, from, layer.page_bytes);
      from += layer.page_bytes;
    }
    if (i < full)
      sequence.names.push_back(
          pool_.publish(sequence.blocks[i], name_before(sequence, i), block_tokens(sequence, i)));
  }
  sequence.swapped = {};
  sequence.swapped_out = false;
  return true;
}

}  // namespace paged
