#pragma once

namespace commvq::cuda {

/// Shape of the blocks that search for key codes.
struct KeySearchConfig {
  int num_rows;        ///< candidates of a block: num_rows / beam_width tokens of one head
  int num_rows_small;  ///< where shared memory does not hold those
  int num_threads;     ///< of a block; warps halve the rows and share the centroids
  int min_blocks;      ///< blocks that an SM should hold

  bool operator==(const KeySearchConfig&) const = default;
};
inline constexpr KeySearchConfig kKeySearch{64, 32, 256, 2};

/// Searches where warpgroups multiply: 16 rows a warp, tokens or eight candidates of two tokens.
struct WarpgroupSearchConfig {
  int num_rows;     ///< of a block
  int num_threads;  ///< of a block
  int min_blocks;   ///< blocks with beams that an SM should hold
};
inline constexpr WarpgroupSearchConfig kWarpgroupSearch{64, 128, 2};
static_assert(kWarpgroupSearch.num_threads == kWarpgroupSearch.num_rows / 16 * 32);
inline constexpr int kMaxSearchBeam = 8;

/// Binary key codes, two centroids a book: a warp searches for those of two tokens with a beam of
/// up to 8, whose 32 extensions are its lanes.
struct BinarySearchConfig {
  int num_tokens;   ///< of a block: rows of a matrix instruction
  int num_threads;  ///< of a block
  int min_blocks;   ///< blocks that an SM should hold
};
inline constexpr BinarySearchConfig kBinarySearch{16, 256, 3};
static_assert(kBinarySearch.num_threads == kBinarySearch.num_tokens / 2 * 32);
inline constexpr int kMaxBinaryBeam = 8;
inline constexpr int kMaxBinaryStages = 128;  ///< a lane has a quarter of the bits in two words

/// Widest beam: a candidate's number has four bits in a sort key.
inline constexpr int kMaxBeamWidth = 16;
/// Most stages whose choices a block keeps in shared memory.
inline constexpr int kMaxStages = 256;
/// Most centroids of a book.
inline constexpr int kMaxCodebookSize = 1024;
/// Most tokens of a call: blocks of a grid.
inline constexpr long long kMaxTokens = 1 << 20;

/// Largest cross term of a stage as a 16-bit integer; a term of b, less the least one, is cut at
/// twice as much (it cannot win beyond), so that sums stay below 2^15.
inline constexpr int kLargestCrossTerm = 8191;

/// Tile of a matrix product.
struct TileConfig {
  int rows;       ///< tokens of a block
  int cols;       ///< outputs of a block
  int warp_rows;  ///< rows of a warp's part
  int warp_cols;
  int depth;  ///< steps in flight, of 32 inputs each; of 64 where warpgroups multiply

  bool operator==(const TileConfig&) const = default;
  constexpr int num_threads() const { return rows / warp_rows * (cols / warp_cols) * 32; }
  constexpr int shared_bytes() const { return depth * (rows + cols) * 32 * 2; }  // of 32 inputs
};
/// For many tokens: 96 KiB, which every supported device has.
inline constexpr TileConfig kLargeTile{128, 256, 64, 64, 4};
/// The same tile where two warpgroups multiply: 192 KiB, which devices of compute capability 9.0
/// have.
inline constexpr TileConfig kWarpgroupTile{128, 256, 16, 256, 4};
static_assert(kWarpgroupTile.cols == kLargeTile.cols);  // squares are summed over them
/// For few: more blocks.
inline constexpr TileConfig kSmallTile{32, 64, 16, 32, 6};
template <bool kLarge>
inline constexpr TileConfig kTileOf = kLarge ? kLargeTile : kSmallTile;
template <bool kLarge>
inline constexpr int kTileThreads = kTileOf<kLarge>.num_threads();
/// Calls of up to so many tokens take the small tile.
inline constexpr int kSmallTileTokens = 512;

/// Weights are padded with zeros to whole tiles of either shape.
inline constexpr int kInputPadding = 32;
inline constexpr int kOutputPadding = 256;

/// Threads of the blocks that load one token each, and of those that write its value codes.
inline constexpr int kTokenThreads = 256;
inline constexpr int kTokenBlocks = 4;  ///< that an SM should hold

}  // namespace commvq::cuda
