#include "commvq/io/shard.hpp"

#include <utility>

#include "commvq/core/error.hpp"

namespace commvq {
namespace {

constexpr const char* kAlternative =
    "; learn codecs for each rank on its own heads (calibrate --ranks N --rank R)";

std::shared_ptr<const KeyCodec> heads_of(const KeyCodec& keys, int first, int count) {
  std::vector<KeyCodebook<float>> codebooks;
  for (int head = first; head < first + count; ++head) codebooks.push_back(keys.codebook(head));
  return std::make_shared<const KeyCodec>(std::move(codebooks));
}

}  // namespace

ModelCodecs shard(const ModelCodecs& codecs, int rank, int num_ranks) {
  codecs.validate();
  require(num_ranks >= 1 && codecs.num_kv_heads % num_ranks == 0, "num_ranks is ", num_ranks,
          "; it must divide the ", codecs.num_kv_heads, " KV heads of a layer");
  require(rank >= 0 && rank < num_ranks, "rank is ", rank, "; it must be in [0, ", num_ranks - 1,
          "]");
  if (num_ranks == 1) return codecs;
  const int count = codecs.num_kv_heads / num_ranks;
  ModelCodecs result = codecs;
  result.num_kv_heads = count;
  for (std::size_t i = 0; i < codecs.layers.size(); ++i) {
    const LayerCodec& layer = codecs.layers[i];
    require(!layer.values, "the value codec of layer ", i, " codes all ", codecs.num_kv_heads,
            " KV heads together and cannot be split", kAlternative);
    if (!layer.keys) continue;
    require(layer.keys->config().norm_per_head, "the key codec of layer ", i,
            " has one norm a token over all ", codecs.num_kv_heads,
            " KV heads, which no rank knows", kAlternative);
    result.layers[i].keys = heads_of(*layer.keys, rank * count, count);
  }
  return result;
}

}  // namespace commvq
