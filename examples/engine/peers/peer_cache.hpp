#pragma once

#include <memory>
#include <vector>

#include "commvq/rope/rope.hpp"

#include "engine/model_config.hpp"
#include "engine/peers/peer_codec.hpp"
#include "engine/sequence_cache.hpp"

namespace engine {

/// How a peer stores one layer. A null codec keeps that side exact.
struct PeerLayer {
  std::shared_ptr<const PeerCodec> keys, values;
  bool keys_after_rope = false;  ///< keys are rotated before they are coded, not after
};

/// What `keys`, `[tokens][num_kv_heads * head_dim]` of positions from `first_position` on, before
/// RoPE, become once coded: decoded and rotated. Their number is a multiple of the codec's
/// `block_tokens()`.
void code_keys(const PeerLayer& layer, const commvq::Rope& rope, Index first_position,
               MatrixView<float> keys);

/// A sequence whose tokens are stored by peers, with the windows of a `commvq::Cache`: a query
/// reads the newest `window` tokens, itself included, and the first `sinks` exactly (in FP16),
/// older ones as decoded from their codes. For quality alone: everything is kept decoded.
class PeerCache final : public SequenceCache {
 public:
  /// Throws `commvq::Error` unless there is one entry a layer and the window holds the tokens that
  /// are coded together.
  PeerCache(const ModelConfig& config, std::vector<PeerLayer> layers, Index window, Index sinks);

  void append_and_attend(int layer, MatrixView<const float> queries, MatrixView<const float> keys,
                         MatrixView<const float> values, Index sliding_window,
                         MatrixView<float> attended) override;
  Index length() const override;
  /// Bytes that this object takes, which says nothing of the peer's storage: see `bits_per_token`.
  Index allocated_bytes() const override;
  std::unique_ptr<SequenceCache> fork() const override {
    return std::make_unique<PeerCache>(*this);
  }

 private:
  /// Keys are rotated. Rows of `[num_kv_heads * head_dim]`.
  struct Layer {
    Index length = 0;
    std::vector<float> keys, values;              // as stored in FP16
    std::vector<float> coded_keys, coded_values;  // as decoded; sinks are exact
    std::vector<float> waiting_keys;              // not yet coded, before RoPE
  };

  void append(const PeerLayer& peer, MatrixView<const float> keys, MatrixView<const float> values,
              Layer& layer) const;
  void code_new_keys(const PeerLayer& peer, Layer& layer) const;
  void code_new_values(const PeerLayer& peer, Layer& layer) const;

  commvq::Rope rope_;
  Index num_channels_;
  std::vector<PeerLayer> peers_;
  Index window_, sinks_;
  std::vector<Layer> layers_;
};

}  // namespace engine
