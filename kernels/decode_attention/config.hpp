#pragma once

namespace commvq::cuda {

/// Tuning values of the key kernel.
struct KeyScoresConfig {
  static constexpr int kThreads = 512;
  static constexpr int kWarps = kThreads / 32;
  /// Blocks that its warps score between two barriers: two warps a block.
  static constexpr int kStepBlocks = kWarps / 2;
  /// Rows (query tokens times query heads of a KV head) that share the decoded keys.
  static constexpr int kMaxRows = 32;
};

/// Tuning values of the value kernel: a thread block adds up kChunkBits code bits for kRows rows;
/// its warps are two groups of kWarpBits bits times four that take turns at the blocks of tokens.
struct ValueSumsConfig {
  static constexpr int kThreads = 256;
  static constexpr int kWarpBits = 128;
  static constexpr int kBitGroups = 2;
  static constexpr int kTokenGroups = 4;
  static constexpr int kChunkBits = kWarpBits * kBitGroups;
  static constexpr int kRows = 32;
};

/// Tuning values of the kernel that merges parts and applies the value decoder.
struct CombineConfig {
  static constexpr int kThreads = 256;
  static constexpr int kChunkBits = 128;
  static constexpr int kRows = 8;
};

/// Tuning values of the exact tokens' attention, which runs beside the key kernel.
struct ExactConfig {
  static constexpr int kThreads = KeyScoresConfig::kThreads;
  static constexpr int kChunkTokens = 32;
  static constexpr int kMaxGroup = 32;  ///< query heads of a KV head
};

}  // namespace commvq::cuda
