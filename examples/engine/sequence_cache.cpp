#include "engine/sequence_cache.hpp"

#include "commvq/attention/attention.hpp"

namespace engine {

std::unique_ptr<SequenceCache> SequenceCache::fork() const {
  commvq::fail("a cache of this kind cannot be forked");
}

void CacheHandle::append_and_attend(int layer, MatrixView<const float> queries,
                                    MatrixView<const float> keys, MatrixView<const float> values,
                                    Index sliding_window, MatrixView<float> attended) const {
  if (other_ != nullptr) {
    other_->append_and_attend(layer, queries, keys, values, sliding_window, attended);
    return;
  }
  commvq::require(host_ != nullptr, "a sequence has no cache");
  commvq::LayerCache& cache = host_->layer(layer);
  cache.append(keys, values);
  commvq::attend(cache, queries, {.sliding_window = sliding_window}, attended);
}

}  // namespace engine
