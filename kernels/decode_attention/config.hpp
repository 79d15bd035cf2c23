#pragma once

namespace commvq::cuda {

/// Most query heads of a KV head: no kernel needs a limit, but grids have theirs.
constexpr int kMaxGroup = 1024;

/// Tuning values of the key kernel.
struct KeyScoresConfig {
  static constexpr int kThreads = 512;
  static constexpr int kWarps = kThreads / 32;
  /// Blocks of a step, which share turned queries: one a warp.
  static constexpr int kStepBlocks = kWarps;
  static constexpr int kStepTokens = kStepBlocks * 32;
  /// Rows of a tile: the eight columns of a matrix product are these for eight tokens of a block
  /// and again for the eight tokens sixteen later.
  static constexpr int kTileRows = 4;
  static constexpr int kTiles = 2;
  /// Rows (query tokens times query heads of a KV head) that share the decoded keys.
  static constexpr int kMaxRows = kTiles * kTileRows;
  /// Steps for which turned queries are kept: warps may be so many steps apart, less one.
  static constexpr int kBuffers = 3;
  /// Warps that turn the queries of one step; they take turns.
  static constexpr int kTurningWarps = 4;
  /// Rows begin at a multiple of this in shared memory, so that a code's place in its address is
  /// free: 128 bytes times the codebook that has kernels of its own.
  static constexpr int kRowAlignment = 128 * 64;
};

/// Tuning values of the value kernel: a thread block adds up kChunkBits code bits for kRows rows.
struct ValueSumsConfig {
  static constexpr int kThreads = 512;
  static constexpr int kWarpBits = 32;
  static constexpr int kChunkBits = kThreads / 32 * kWarpBits;
  static constexpr int kRows = 32;
  static constexpr int kRoundBlocks = 4;  ///< that are multiplied at once
  static constexpr int kStages = 4;       ///< rounds in shared memory
};

/// Tuning values of the kernel for binary codes.
struct BinaryAttentionConfig {
  static constexpr int kTileTokens = 256;  ///< that share queries at the nodes
  static constexpr int kTileWarps = 4;     ///< that share a tile: some blocks of it each
  static constexpr int kRows = 4;          ///< query heads at once
};

/// Tuning values of the kernel that merges parts and applies the value decoder.
struct CombineConfig {
  static constexpr int kRows = 4;
  static constexpr int kChunk = 64;  ///< sums at once, where all heads share them
  /// Parts of which a lane reads sums at once, where all heads share them and where not.
  static constexpr int kPartsAtOnce = 6;
  static constexpr int kPartsAtOnceOfHeads = 4;
};

/// Tuning values of the exact tokens' attention, by warps.
struct ExactConfig {
  /// Query heads of a KV head that a warp takes at once.
  static constexpr int rows(int head_dim) { return head_dim > 128 ? 2 : 4; }
  static constexpr int kWarps = 16;  ///< of a thread block, at most
  /// Into how many pieces one query's tokens are cut at most, where warps are idle.
  static constexpr int kMaxPieces = 8;
  /// Time of one exact token, where all warps are busy, in that of a token with binary codes ...
  static constexpr int kCostInBinary = 5;
  /// ... and in that of adding up one row of 8 bits. A coded token takes that beside its rows, and
  /// three groups of rows of 4 bits as long as so many rows.
  static constexpr int kCostInRows = 60;
  static constexpr int kCodedCostInRows = 14;
  static constexpr int kRowsOfThreeGroups = 16;
};

}  // namespace commvq::cuda
