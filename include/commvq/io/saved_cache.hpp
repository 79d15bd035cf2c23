#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "commvq/cache/cache.hpp"
#include "commvq/core/export.h"

namespace commvq {

/// Longest tag of a saved cache, in bytes.
inline constexpr Index kMaxCacheTag = 4096;

/// Writes the cache of one sequence to a file, byte for byte as it is: codes, norms, exact copies;
/// docs/saved_cache.md has the layout. The file is bound to the configuration, RoPE included, and
/// by digests to the codecs; `tag`, at most kMaxCacheTag bytes, binds it to what the library cannot
/// see, such as a digest of the model and of the prompt. Nothing of tokens that were truncated is
/// written, and equal caches give equal files.
///
/// The file is written beside `path` and renamed: whatever fails, or if the process ends, `path` is
/// the old file or the new one, whole. It can be read and written by its owner alone. Throws
/// `Error` with the system's reason.
COMMVQ_API void save_cache(const std::filesystem::path& path, const Cache& cache,
                           const std::string& tag = {});

/// Restores what `save_cache` wrote: same codes, and attention equal to the bit. The arguments are
/// those with which the cache was made and saved.
///
/// Throws `Error` naming the reason, and returns nothing, for a file of another kind or version,
/// cut short or longer than it says, with any bit changed, saved with another configuration, other
/// codecs or another tag. A file that passes all checksums may still have been made by anyone:
/// contents that would lead attention outside a codebook or a page are refused too.
///
/// Besides the cache's tables, which belong to the codecs, reading allocates at most four times the
/// file's size and 64 KiB.
COMMVQ_API Cache load_cache(const std::filesystem::path& path, const CacheConfig& config,
                            std::vector<LayerCodec> codecs, const std::string& tag = {});

}  // namespace commvq
