#include "engine/peers/peer_codec.hpp"

namespace engine {

double bits_per_token(const PeerCodec& codec, Index num_channels) {
  const std::vector<float> zeros(static_cast<std::size_t>(codec.block_tokens() * num_channels));
  const PeerCodes kept = codec.encode(commvq::as_matrix(zeros, codec.block_tokens(), num_channels));
  const double bits =
      double(kept.codes.size()) * codec.code_bits() + 16.0 * double(kept.halves.size());
  return bits / double(codec.block_tokens());
}

}  // namespace engine
