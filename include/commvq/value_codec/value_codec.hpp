#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "commvq/core/digest.hpp"
#include "commvq/core/export.h"
#include "commvq/core/view.hpp"

namespace commvq {

/// Shape of the value codec of one layer (CommVQ, section 3.2).
///
/// The channels may be cut into equal blocks of consecutive ones, each coded by a network, a
/// decoder and a scale of its own, as if it were a layer by itself: for instance one block a KV
/// head, so that no head needs another's codes.
struct COMMVQ_API ValueCodecConfig {
  int num_channels = 1024;  ///< num_kv_heads * head_dim, a multiple of 8 * num_blocks
  int bits = 1;             ///< binary codes per channel, 1 or 2
  int hidden_size = 2048;   ///< H of each block's encoder network
  int polish_sweeps = 0;    ///< passes of bit flips after the network, in [0, 64]; 0: the paper's
  int num_blocks = 1;       ///< B, at least 1; 1: the paper's, all channels together
  /// Eight consecutive bits of a block's code are numbers of 3, 2, 2 and 1 bits (`graded_bit`),
  /// each of which multiplies one vector: the decoder's row of a bit is its weight times the row of
  /// the number's last bit. Attention then computes with half as many vectors as there are bits.
  /// The polish moves a number as a whole; otherwise encoding, decoding and storing are those of
  /// any codec.
  bool graded = false;

  bool operator==(const ValueCodecConfig&) const = default;

  /// The shape of one block as a codec by itself.
  ValueCodecConfig block() const {
    ValueCodecConfig one = *this;
    one.num_channels /= num_blocks;
    one.num_blocks = 1;
    return one;
  }

  /// `count` such codecs side by side, as blocks of one.
  ValueCodecConfig repeated(int count) const {
    ValueCodecConfig all = *this;
    all.num_channels *= count;
    all.num_blocks *= count;
    return all;
  }

  /// Binary codes of one token; two of them form a group that takes one of four patterns.
  int num_code_bits() const { return num_channels * bits; }
  int num_groups() const { return num_code_bits() / 2; }
  /// Outputs of the encoder networks: four per group.
  int num_logits() const { return 4 * num_groups(); }

  /// Throws `Error` naming the first field that is out of range.
  void validate() const;

  /// The reference's shapes: H = min(4096, 2 C bits).
  static ValueCodecConfig paper_1bit(int num_channels) { return paper(num_channels, 1); }
  static ValueCodecConfig paper_2bit(int num_channels) { return paper(num_channels, 2); }

  /// The library's own: as many bits, graded, found by the network and up to 8 sweeps.
  static ValueCodecConfig commvq_1bit(int num_channels) { return commvq(num_channels, 1); }
  static ValueCodecConfig commvq_2bit(int num_channels) { return commvq(num_channels, 2); }

  /// The same with a block per KV head: for attention that reads one head at a time, and for layers
  /// that are split by heads. See `KeyCodecConfig::speed_1bit`.
  static ValueCodecConfig speed_1bit(int num_channels, int num_kv_heads) {
    return speed(num_channels, num_kv_heads, 1);
  }
  static ValueCodecConfig speed_2bit(int num_channels, int num_kv_heads) {
    return speed(num_channels, num_kv_heads, 2);
  }

 private:
  static ValueCodecConfig speed(int num_channels, int num_kv_heads, int bits);
  static ValueCodecConfig commvq(int num_channels, int bits);
  static ValueCodecConfig paper(int num_channels, int bits);
};

/// Parameters of a value codec, all row-major: B blocks one after another, each of C channels and
/// L logits. Of one block:
///
///     encoder:  h = GELU(hidden_weight LayerNorm(v) + hidden_bias)
///               logits = output_weight h + output_bias, four per group; the largest one picks the
///               group's pattern of two bits (b[2g], b[2g+1]): 0 = (1,0), 1 = (0,1), 2 = (1,1),
///               3 = (0,0)
///     decoder:  u = decoder^T b,   value ~ |v| u / |u|
///
/// GELU is the exact one, x Phi(x). With `polish_sweeps` single bits are then flipped, in order, as
/// long as that lowers |v - s u|^2 with the best scale s = <v, u> / |u|^2; of graded codes, whole
/// numbers are moved. The norm is restored all the same: s is smaller, and attention averages the
/// errors of values away but not their shrinking.
struct COMMVQ_API ValueCodecWeights {
  std::vector<float> norm_gain;            ///< [B][C]
  std::vector<float> norm_bias;            ///< [B][C]
  std::vector<float> hidden_weight;        ///< [B][H][C]
  std::vector<float> hidden_bias;          ///< [B][H]
  std::vector<float> output_weight;        ///< [B][L][H]
  std::vector<float> output_bias;          ///< [B][L]
  std::vector<float> decoder;              ///< [B][code bits of a block][C], E of the paper
  std::vector<float> channel_scales = {};  ///< [B][C], positive, or empty for all ones

  /// Makes the decoder what `ValueCodecConfig::graded` asks for: the rows of the last bits of all
  /// numbers decide. `channels` are those of a block, a multiple of 8 as the blocks' bits are.
  void derive_graded_rows(Index channels);

  /// Calls `use` with a pointer to each member.
  template <class Use>
  static void for_each(Use use) {
    using W = ValueCodecWeights;
    for (const auto weight : {&W::norm_gain, &W::norm_bias, &W::hidden_weight, &W::hidden_bias,
                              &W::output_weight, &W::output_bias, &W::decoder, &W::channel_scales})
      use(weight);
  }
};

/// Epsilon of the encoder's LayerNorm. Values are scaled to unit norm before they reach it, so that
/// the code of a value does not depend on its length.
inline constexpr float kValueLayerNormEpsilon = 1e-5f;

/// Bits of the four patterns, bit 0 first: (1,0), (0,1), (1,1), (0,0).
inline constexpr std::uint8_t kValuePatterns[4] = {0b01, 0b10, 0b11, 0b00};

/// Values of one layer. Immutable after construction.
class COMMVQ_API ValueCodec {
 public:
  /// Throws `Error` if a weight has the wrong size or is not finite, or a channel scale not
  /// positive.
  ValueCodec(const ValueCodecConfig& config, ValueCodecWeights weights);

  const ValueCodecConfig& config() const { return config_; }
  const ValueCodecWeights& weights() const { return weights_; }
  bool is_scaled() const { return !weights_.channel_scales.empty(); }
  /// Of the configuration and all weights: codecs with equal digests give equal codes.
  const Digest& digest() const { return digest_; }
  /// E, `[num_code_bits][num_channels / num_blocks]`: row i is of the block that bit i belongs to.
  MatrixView<const float> decoder() const {
    return {weights_.decoder.data(), config_.num_code_bits(), config_.block().num_channels};
  }

  /// E E^T of each block's encoder's E (each channel divided by its scale), `[num_code_bits][code
  /// bits of a block]`, with which codes are polished; empty without polish.
  MatrixView<const float> gram() const {
    if (gram_.empty()) return {};
    return {gram_.data(), config_.num_code_bits(), config_.block().num_code_bits()};
  }

  /// Bytes of the packed binary code of one token.
  int code_bytes() const { return config_.num_code_bits() / 8; }
  /// Bits of one token: the binary code and the bf16 scales.
  Index bits_per_token() const { return config_.num_code_bits() + Index{16} * config_.num_blocks; }

  /// Encodes `values` `[tokens][num_channels]`. `codes` is `[tokens][code_bytes()]`, bit i of the
  /// code in bit i % 8 of byte i / 8, the bits of a block together; `scales` `[tokens][num_blocks]`
  /// receives bf16 bits of |v| / |u| (0 where v or u is zero). Throws `Error` for shapes that do
  /// not fit, and for NaN, infinity or a scale beyond bf16's range, naming token and channel.
  /// Parallel over blocks and chunks of tokens.
  void encode(MatrixView<const float> values, MatrixView<std::uint8_t> codes,
              std::uint16_t* scales) const;

  /// Decodes to `values` `[tokens][num_channels]`: scale * E^T b.
  void decode(MatrixView<const std::uint8_t> codes, const std::uint16_t* scales,
              MatrixView<float> values) const;

 private:
  /// The encoder's E: what values divided by the channel scales are coded with.
  const std::vector<float>& encoder_decoder() const {
    return is_scaled() ? unscaled_decoder_ : weights_.decoder;
  }

  ValueCodecConfig config_;
  ValueCodecWeights weights_;
  Digest digest_;
  std::vector<float> unscaled_decoder_;  // decoder / channel_scales; empty without scales
  std::vector<float> gram_;              // see gram()
};

}  // namespace commvq
