#include "commvq/io/shard.hpp"

#include <utility>

#include "commvq/core/error.hpp"

namespace commvq {
namespace {

constexpr const char* kAlternative =
    ", or learn codecs for each rank on its own heads (calibrate --ranks N --rank R)";

std::shared_ptr<const KeyCodec> heads_of(const KeyCodec& keys, int first, int count) {
  std::vector<KeyCodebook<float>> codebooks;
  for (int head = first; head < first + count; ++head) codebooks.push_back(keys.codebook(head));
  return std::make_shared<const KeyCodec>(std::move(codebooks));
}

/// The blocks of one rank, which has them one after another in every array.
std::shared_ptr<const ValueCodec> blocks_of(const ValueCodec& values, int rank, int num_ranks) {
  ValueCodecConfig config = values.config();
  config.num_channels /= num_ranks;
  config.num_blocks /= num_ranks;
  ValueCodecWeights weights;
  ValueCodecWeights::for_each([&](auto weight) {
    const std::vector<float>& all = values.weights().*weight;
    const auto share = static_cast<Index>(all.size()) / num_ranks;
    (weights.*weight).assign(all.begin() + rank * share, all.begin() + (rank + 1) * share);
  });
  return std::make_shared<const ValueCodec>(config, std::move(weights));
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
    if (layer.values) {
      const int blocks = layer.values->config().num_blocks;
      require(blocks % num_ranks == 0, "the value codec of layer ", i, " codes ",
              codecs.num_kv_heads, " KV heads in ", blocks, " blocks, which ", num_ranks,
              " ranks cannot share; learn one with num_blocks a multiple of ", num_ranks,
              " (calibrate --value-blocks)", kAlternative);
      result.layers[i].values = blocks_of(*layer.values, rank, num_ranks);
    }
    if (!layer.keys) continue;
    require(layer.keys->config().norm_per_head, "the key codec of layer ", i,
            " has one norm a token over all ", codecs.num_kv_heads,
            " KV heads, which no rank knows; learn one with norm_per_head", kAlternative);
    result.layers[i].keys = heads_of(*layer.keys, rank * count, count);
  }
  return result;
}

}  // namespace commvq
