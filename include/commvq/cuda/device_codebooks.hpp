#pragma once

#include <cstdint>
#include <memory>

#include "commvq/cuda/page_layout.hpp"

namespace commvq {
struct LayerCodec;
struct RopeConfig;
}  // namespace commvq

namespace commvq::cuda {

/// Rows of some books for up to `width` pairs of their group, as one decode kernel adds them up.
struct KeySlice {
  int plane;                ///< of the page layout, the first of `planes_at_once`
  int num_books;            ///< of these planes
  int row_bits;             ///< 8 or 4
  int first_pair;           ///< of the head
  int num_pairs;            ///< pairs of the head that it covers; the rest of `width` is zeros
  int width;                ///< 64 or 32
  Index row_bytes;          ///< of one head: the image of the kernel's shared memory
  const std::int8_t* rows;  ///< device, [num_kv_heads][row_bytes]
  const float* units;       ///< device, [num_kv_heads][width]
  /// device, [num_kv_heads][width] pairs of fp16, see `IntegerKeySlice::zero_points`
  const std::uint32_t* zero_points;
  /// device, [num_kv_heads][kNarrowWeights], of the image's first lines; of no use with rows of 8
  /// bits
  const std::uint8_t* line_weights;
  /// device, [kTurnTokens][width / 8][4 threads][cosines, sines] pairs of fp16: RoPE by 0, 1, ...
  /// tokens of a thread's pairs, in the order of the rows' words
  const std::uint32_t* token_turns;

  static constexpr int kTurnTokens = 512;
  /// Lines of rows of 4 bits (`IntegerKeySlice::image`): rows of a stage's two books of 64
  /// centroids, and padding by which four threads that read a row each meet different banks.
  static constexpr int kNarrowLineBytes = 64 * 128 + 16;
  /// Groups of four lines that are added up together.
  static constexpr int narrow_groups(int num_books) { return (num_books + 7) / 8; }
  /// Weights of lines that a kernel tells apart: those of the third group are those of all others.
  static constexpr int kNarrowWeights = 12;
};

/// Binary keys, by books of two rows, as the decode kernel that looks nothing up reads them: pairs
/// that turn fast are decoded, the others' scores interpolated between four places of a tile.
struct BinaryKeys {
  static constexpr int kPairs = 64;
  static constexpr int kTileTokens = 256;
  static constexpr int kTurnTokens = 128;
  static constexpr int kNodes = 4;

  int high_eights = 0;     ///< eights of pairs that are decoded: 3, 5 or 8
  int lane_words = 0;      ///< words of codes that a lane reads of a token: 1 or 2
  bool graded = false;     ///< see `KeyCodecConfig::graded`
  int nodes[kNodes] = {};  ///< places in a tile
  /// device, fp16: [num_kv_heads][high_eights][real, imaginary parts][16 lane_words][8 pairs][8
  /// codes]; code c of eight i is bit i % 16 + 16 (c % 2) of word 4 (i / 16) + c / 2. Graded: 8
  /// lane_words; code c of eight i is number i % 4, of 1, 2, 2 and 3 bits, of byte i / 4 % 2 + 2 (c
  /// % 2) of word 4 (i / 8) + c / 2, its bits in the opposite order
  const std::uint32_t* high_entries = nullptr;
  /// device, fp16: [num_kv_heads][8 - high_eights][real, imaginary parts][16 or 8 lane_words][8
  /// codes][8 pairs]
  const std::uint32_t* low_entries = nullptr;
  /// device, pairs of fp16, [kTurnTokens / 32][high_eights][2][32 lanes] of 16 bytes: RoPE by 0 to
  /// kTurnTokens - 1 tokens
  const std::uint32_t* turns = nullptr;
  const float* node_weights = nullptr;  ///< device, [kTileTokens][kNodes]
  const float* high_factors = nullptr;  ///< device, [num_kv_heads]: of products with decoded keys
  const float* low_factors = nullptr;   ///< device, [num_kv_heads]: of products at the nodes
};

/// What the decode kernels read of a layer's codecs. Plain data; the memory belongs to the
/// `DeviceCodebooks` it came from.
struct CodebooksView {
  static constexpr int kMaxSlices = 32;

  DevicePageLayout layout;
  int num_slices = 0;
  KeySlice slices[kMaxSlices] = {};
  BinaryKeys binary;                        ///< instead of slices, where layout.is_binary()
  const std::uint64_t* turns = nullptr;     ///< device, [num_pairs]: RoPE, in 2^-64 turns a token
  const std::uint16_t* channels = nullptr;  ///< device, [2 * num_pairs]: channel of planar index
  /// device, [layout.num_value_sums()][num_kv_heads * head_dim / value_blocks]
  const float* decoder = nullptr;
  int num_multiprocessors = 0;  ///< of the device that holds them
};

/// The codecs of one layer on the device, made once by `prepare`. Owns its memory; moves, does not
/// copy. Any number of streams may read it at once; it must outlive the work that does.
class DeviceCodebooks {
 public:
  const CodebooksView& view() const { return view_; }
  const DevicePageLayout& layout() const { return view_.layout; }

 private:
  friend DeviceCodebooks prepare(const LayerCodec& codec, const RopeConfig& rope, int page_size);
  CodebooksView view_;
  std::shared_ptr<void> memory_;
};

/// Copies a layer's codecs to the current device: keys as integers (see `IntegerKeySlice`),
/// the value decoder, RoPE's frequencies. Allocates and synchronises. Throws `Error` unless both
/// sides of the codec are there, for shapes that the kernels do not support and for CUDA errors.
DeviceCodebooks prepare(const LayerCodec& codec, const RopeConfig& rope, int page_size = 64);

}  // namespace commvq::cuda
