// A layer's cache from parts that may come from anywhere. Attention reads pages without looking
// where a code points, so here every code is looked at.
#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include "commvq/cache/cache.hpp"

#include "core/divide_up.hpp"

namespace commvq {
namespace {

void check_extent(const CacheConfig& config, const LayerExtent& extent) {
  const auto [length, exact_begin, exact_floor, coded_end] = extent;
  require(length >= 0 && length <= kMaxTokens, "the saved length is ", length,
          "; it must be in [0, ", kMaxTokens, "]");
  const Index end = std::max(length, config.sinks);
  require(config.sinks <= exact_floor && exact_floor <= exact_begin && exact_begin <= coded_end &&
              coded_end <= end && coded_end >= length - config.window,
          "the saved bounds do not fit each other: sinks ", config.sinks, ", exact_floor ",
          exact_floor, ", exact_begin ", exact_begin, ", coded_end ", coded_end, ", length ",
          length, ", window ", config.window);
}

void check_sizes(const CacheConfig& config, const LayerExtent& extent, const PageLayout& layout,
                 const ExactStore& sinks, const ExactStore& exact,
                 const std::vector<PagePtr>& pages) {
  const auto check = [](const char* what, Index found, Index needed) {
    require(found == needed, "the saved layer has ", found, " ", what, "; its bounds need ",
            needed);
  };
  for (const ExactStore* store : {&sinks, &exact})
    require(store->type() == config.exact_type &&
                store->row_bytes() == 2 * config.num_channels() * size_of(config.exact_type),
            "the saved exact copies have another type or number of channels than the cache");
  check("sinks", sinks.size(), std::min(config.sinks, extent.length));
  check("exact copies", exact.size(), std::max(Index{0}, extent.length - extent.exact_begin));
  check("pages", static_cast<Index>(pages.size()),
        divide_up(extent.coded_end - config.sinks, config.page_size));
  for (const PagePtr& page : pages) {
    require(page != nullptr, "a saved page is null");
    check("bytes in a page", static_cast<Index>(page->size()), layout.page_bytes());
  }
}

/// Looks at what the tokens of one layer are made of. Keeps its scratch memory between them.
class TokenCheck {
 public:
  TokenCheck(const PageLayout& layout, const LayerCodec& codec)
      : layout_(layout), codebook_size_(codec.keys ? codec.keys->config().codebook_size : 1) {
    codes_.resize(static_cast<std::size_t>(Index{layout.num_kv_heads} * layout.key_codes));
    norms_.resize(static_cast<std::size_t>(layout.num_key_norms));
  }

  /// A token in slot `slot` of a page.
  void coded(const Page& page, Index slot, Index token) {
    const std::uint8_t* const bytes = page.data();
    if (layout_.keys_coded()) {
      finite(bytes + layout_.key_norm(slot, 0), layout_.num_key_norms, FloatType::kBf16, token);
      codes(page, slot, token);
    } else {
      exact(bytes + layout_.exact_keys(slot), layout_.num_channels, token);
    }
    if (layout_.values_coded()) {
      finite(bytes + layout_.value_scale(slot, 0), layout_.num_value_scales, FloatType::kBf16,
             token);
    } else {
      exact(bytes + layout_.exact_values(slot), layout_.num_channels, token);
    }
  }

  /// `count` numbers of the cache's exact type.
  void exact(const std::uint8_t* bytes, Index count, Index token) {
    finite(bytes, count, layout_.exact_type, token);
  }

 private:
  void finite(const std::uint8_t* bytes, Index count, FloatType type, Index token) {
    numbers_.resize(static_cast<std::size_t>(count));
    widen_floats(bytes, count, type, numbers_.data());
    for (const float number : numbers_)
      require(std::isfinite(number), "a saved number of token ", token, " is ", number,
              "; it must be finite");
  }

  void codes(const Page& page, Index slot, Index token) {
    // Where the codebook's size is a power of two every code fits.
    if (std::has_single_bit(static_cast<unsigned>(codebook_size_))) return;
    layout_.get_key(page, slot, codes_.data(), norms_.data());
    for (const std::uint16_t code : codes_)
      require(code < codebook_size_, "a saved code of token ", token, " is ", code,
              "; the codebook has ", codebook_size_, " centroids");
  }

  const PageLayout& layout_;
  int codebook_size_;
  std::vector<std::uint16_t> codes_, norms_;
  std::vector<float> numbers_;
};

}  // namespace

LayerCache::LayerCache(const CacheConfig& config, LayerCodec codec, const LayerExtent& extent,
                       ExactStore sink_store, ExactStore exact_store, std::vector<PagePtr> pages)
    : LayerCache(config, std::move(codec)) {
  check_extent(config_, extent);
  check_sizes(config_, extent, page_layout_, sink_store, exact_store, pages);
  TokenCheck check(page_layout_, codec_);
  for (Index i = 0; i < sink_store.size(); ++i)
    check.exact(sink_store.keys(i), 2 * config_.num_channels(), i);
  for (Index i = 0; i < exact_store.size(); ++i)
    check.exact(exact_store.keys(i), 2 * config_.num_channels(), extent.exact_begin + i);
  for (Index token = config_.sinks; token < extent.coded_end; ++token) {
    const Index coded = token - config_.sinks;
    check.coded(*pages[static_cast<std::size_t>(coded / config_.page_size)],
                coded % config_.page_size, token);
  }
  length_ = extent.length;
  exact_begin_ = extent.exact_begin;
  exact_floor_ = extent.exact_floor;
  coded_end_ = extent.coded_end;
  sink_store_ = std::move(sink_store);
  exact_store_ = std::move(exact_store);
  pages_ = std::move(pages);
}

}  // namespace commvq
