#include "engine/peers/peer.hpp"

#include <regex>

#include "engine/peers/kivi.hpp"
#include "engine/peers/rotation.hpp"
#include "engine/peers/vector_quantizer.hpp"

namespace engine {
namespace {

/// One layer's codecs.
class LayerMaker {
 public:
  LayerMaker(const Peer& peer, const ModelConfig& config, std::uint64_t seed)
      : peer_(peer), config_(config), seed_(seed) {}

  PeerLayer make(const LayerData* data, Index context) const {
    PeerLayer layer;
    layer.keys_after_rope = peer_.keys_after_rope;
    if (peer_.learnt()) {
      std::vector<float> keys = data->keys;
      if (peer_.keys_after_rope) rotate(keys, context);
      layer.keys = learn(keys, 2 * seed_);
      layer.values = learn(data->values, 2 * seed_ + 1);
    } else if (peer_.method == Peer::Method::kKivi) {
      const Index channels = config_.kv_size();
      layer.keys =
          std::make_shared<KiviCodec>(peer_.bits, KiviCodec::Groups::kAlongTokens, channels);
      layer.values =
          std::make_shared<KiviCodec>(peer_.bits, KiviCodec::Groups::kAlongChannels, channels);
    } else {
      const auto codec = [&](std::uint64_t seed) {
        return std::make_shared<RotationCodec>(peer_.bits, config_.num_kv_heads, config_.head_dim(),
                                               seed);
      };
      layer.keys = codec(2 * seed_);
      layer.values = codec(2 * seed_ + 1);
    }
    return layer;
  }

 private:
  std::shared_ptr<const PeerCodec> learn(const std::vector<float>& rows, std::uint64_t seed) const {
    VectorQuantizerOptions options;
    options.shape = peer_.method == Peer::Method::kProduct
                        ? VectorQuantizerShape::product(peer_.bits)
                        : VectorQuantizerShape::residual(peer_.bits, config_.head_dim());
    options.seed = seed;
    const Index channels = config_.kv_size();
    return std::make_shared<VectorQuantizer>(
        commvq::as_matrix(rows, static_cast<Index>(rows.size()) / channels, channels), options);
  }

  /// Turns keys of contexts that each begin at position 0.
  void rotate(std::vector<float>& keys, Index context) const {
    const commvq::Rope rope(config_.rope);
    const Index channels = config_.kv_size(), rows = static_cast<Index>(keys.size()) / channels;
    for (Index first = 0; first < rows; first += context)
      rope.apply(MatrixView<float>(keys.data() + first * channels, std::min(context, rows - first),
                                   channels),
                 0);
  }

  const Peer& peer_;
  const ModelConfig& config_;
  std::uint64_t seed_;
};

}  // namespace

Peer Peer::parse(const std::string& name) {
  static const std::regex pattern("(kivi|rotation|pq|rq)_([1248])bit(_roped)?");
  std::smatch parts;
  commvq::require(std::regex_match(name, parts, pattern), "there is no peer ", name,
                  "; peers are kivi, rotation, pq and rq with _1bit, _2bit, _4bit or _8bit and, ",
                  "for keys coded after RoPE, _roped: kivi_2bit, pq_1bit_roped");
  Peer peer;
  peer.name = name;
  peer.method = parts[1] == "kivi"       ? Method::kKivi
                : parts[1] == "rotation" ? Method::kRotation
                : parts[1] == "pq"       ? Method::kProduct
                                         : Method::kResidual;
  peer.bits = std::stoi(parts[2]);
  peer.keys_after_rope = parts[3].matched;
  return peer;
}

std::vector<PeerLayer> Peer::make_layers(const ModelConfig& config, const CalibrationData& data,
                                         std::uint64_t seed) const {
  commvq::require(!learnt() || static_cast<int>(data.layers.size()) == config.num_layers, "peer ",
                  name, " learns its codebooks: it needs calibration text");
  std::vector<PeerLayer> layers;
  layers.reserve(static_cast<std::size_t>(config.num_layers));
  for (int i = 0; i < config.num_layers; ++i)
    layers.push_back(
        LayerMaker(*this, config, seed * 1000003 + static_cast<std::uint64_t>(i))
            .make(learnt() ? &data.layers[static_cast<std::size_t>(i)] : nullptr, data.context));
  return layers;
}

double bits_per_number(const std::vector<PeerLayer>& layers, Index num_channels) {
  const auto bits = [&](const PeerCodec* codec) {
    return codec != nullptr ? bits_per_token(*codec, num_channels) : 16.0 * double(num_channels);
  };
  double sum = 0;
  for (const PeerLayer& layer : layers) sum += bits(layer.keys.get()) + bits(layer.values.get());
  return sum / (2.0 * double(num_channels) * double(layers.size()));
}

}  // namespace engine
