#include "engine/cache_method.hpp"

#include "commvq/attention/attention.hpp"

#include "engine/peers/peer.hpp"

namespace engine {
namespace {

/// A `commvq::Cache` that owns itself.
class HostCache final : public SequenceCache {
 public:
  explicit HostCache(commvq::Cache cache) : cache_(std::move(cache)) {}

  void append_and_attend(int layer, MatrixView<const float> queries, MatrixView<const float> keys,
                         MatrixView<const float> values, Index sliding_window,
                         MatrixView<float> attended) override {
    CacheHandle(cache_).append_and_attend(layer, queries, keys, values, sliding_window, attended);
  }
  Index length() const override { return cache_.length(); }
  Index allocated_bytes() const override { return cache_.allocated_bytes(); }
  std::unique_ptr<SequenceCache> fork() const override {
    return std::make_unique<HostCache>(cache_.fork());
  }

 private:
  commvq::Cache cache_;
};

/// Encodes and decodes keys, then rotates them.
void code_keys(const commvq::KeyCodec& codec, const commvq::Rope& rope, MatrixView<float> keys) {
  const Index num_codes = Index{codec.num_kv_heads()} * codec.config().num_codes();
  std::vector<std::uint16_t> codes(static_cast<std::size_t>(keys.rows * num_codes));
  std::vector<std::uint16_t> norms(static_cast<std::size_t>(keys.rows * codec.num_norms()));
  const auto code_rows = commvq::as_matrix(codes, keys.rows, num_codes);
  codec.encode(keys, code_rows, norms.data());
  codec.decode(code_rows, norms.data(), keys);
  rope.apply(keys, 0);
}

}  // namespace

double bits_per_number(const commvq::Cache& cache, Index num_channels) {
  double bits = 0;
  for (int layer = 0; layer < cache.num_layers(); ++layer)
    bits += double(cache.layer(layer).bits_per_token());
  return bits / (2.0 * double(num_channels) * cache.num_layers());
}

CacheMethod codec_method(std::string name, const Model& model,
                         const std::vector<commvq::LayerCodec>& codecs, Index window, Index sinks) {
  const commvq::Rope rope(model.config().rope);
  const commvq::Cache empty = model.make_cache(codecs, window, sinks);
  CacheMethod method;
  method.name = std::move(name);
  method.bits_per_number = bits_per_number(empty, model.config().kv_size());
  method.new_cache = [empty] { return std::make_unique<HostCache>(empty.fork()); };
  for (const commvq::LayerCodec& layer : codecs) {
    method.key_round_trips.emplace_back();
    if (layer.keys)
      method.key_round_trips.back() = [rope, codec = layer.keys](MatrixView<float> keys) {
        code_keys(*codec, rope, keys);
      };
  }
  return method;
}

CacheMethod peer_method(std::string name, const Model& model, const std::vector<PeerLayer>& layers,
                        Index window, Index sinks) {
  const ModelConfig& config = model.config();
  const PeerCache empty(config, layers, window, sinks);
  CacheMethod method;
  method.name = std::move(name);
  method.bits_per_number = bits_per_number(layers, config.kv_size());
  method.packed = false;
  method.new_cache = [empty] { return std::make_unique<PeerCache>(empty); };
  for (const PeerLayer& layer : layers)
    method.key_round_trips.push_back(
        [layer, rope = commvq::Rope(config.rope)](MatrixView<float> keys) {
          const Index block = layer.keys ? layer.keys->block_tokens() : 1;
          code_keys(layer, rope, 0, keys.middle_rows(0, keys.rows / block * block));
        });
  return method;
}

}  // namespace engine
