#include "commvq/cache/key_tables.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>

namespace commvq {

KeyTables::KeyTables(std::shared_ptr<const KeyCodec> codec)
    : codec_(std::move(codec)),
      padded_pairs_((config().group_pairs + kLanes - 1) / kLanes * kLanes) {
  const Index num_groups = Index{codec_->num_kv_heads()} * config().num_groups();
  lines_.resize(static_cast<std::size_t>(num_groups * group_size() / kLanes));
  units_.resize(
      static_cast<std::size_t>(Index{codec_->num_kv_heads()} * config().pairs.num_pairs()));
  for (int head = 0; head < codec_->num_kv_heads(); ++head)
    for (int group_index = 0; group_index < config().num_groups(); ++group_index)
      fill(head, group_index);
}

void KeyTables::fill(int head, int group_index) {
  const KeyCodebook<float>& codebook = codec_->codebook(head);
  const int g = config().group_pairs;
  const int num_books = config().num_stages * 2;
  const Index rows_per_book = config().codebook_size;
  const float* const source = codebook.book(group_index, 0, 0);
  std::int16_t* const target = lines_[first_line(head, group_index)].lanes;
  float* const units =
      units_.data() + Index{head} * config().pairs.num_pairs() + Index{group_index} * g;

  for (int i = 0; i < g; ++i) {
    // The largest sum of one row a book, either part of the pair.
    double bound = 0;
    for (int book = 0; book < num_books; ++book) {
      float largest = 0;
      for (Index row = book * rows_per_book; row < (book + 1) * rows_per_book; ++row)
        largest = std::max(
            {largest, std::abs(source[row * 2 * g + i]), std::abs(source[row * 2 * g + g + i])});
      bound += largest;
    }
    // Rounding may add half a unit a book.
    const double unit = bound / (32767 - num_books);
    units[i] = static_cast<float>(unit);
    std::int16_t* const lane = target + i / kLanes * 2 * kLanes + i % kLanes;
    const int kept_every = config().tied ? 2 : 1;
    for (int book = 0; book < this->num_books(); ++book)
      for (Index row = 0; row < rows_per_book; ++row)
        for (int part = 0; part < 2; ++part) {
          const float entry =
              source[(book * kept_every * rows_per_book + row) * 2 * g + part * g + i];
          lane[(book * rows_per_book + row) * row_size() + part * kLanes] =
              static_cast<std::int16_t>(unit > 0 ? std::lrint(entry / unit) : 0);
        }
  }
}

std::shared_ptr<const KeyTables> KeyTables::of(const std::shared_ptr<const KeyCodec>& codec) {
  static std::mutex mutex;
  static std::map<const KeyCodec*, std::weak_ptr<const KeyTables>> registry;
  if (!codec) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  std::erase_if(registry, [](const auto& entry) { return entry.second.expired(); });
  if (const auto known = registry.find(codec.get()); known != registry.end())
    if (auto tables = known->second.lock()) return tables;
  auto tables = std::make_shared<const KeyTables>(codec);
  registry[codec.get()] = tables;
  return tables;
}

}  // namespace commvq
