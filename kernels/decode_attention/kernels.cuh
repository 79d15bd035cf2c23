#pragma once

#include "decode_attention/binary/shape.cuh"
#include "decode_attention/key_codes.hpp"
#include "decode_attention/key_scores/shared.cuh"

namespace commvq::cuda {

/// Launches one slice of keys, and beside the first one the exact tokens. Returns the launch's
/// error.
using KeyScoresLauncher = cudaError_t (*)(const key_scores::Arguments& arguments, dim3 grid,
                                          int shared_bytes, cudaStream_t stream);

/// For keys whose rows, of `width` pairs, 64 or 32, have 8 bits; `num_tiles` of rows of a head, up
/// to `KeyScoresConfig::kTiles`, share a thread block.
KeyScoresLauncher byte_rows_launcher(int width, int num_tiles);

/// For keys whose rows, of 64 centroids and 64 pairs, have 4 bits: of up to four stages a group.
KeyScoresLauncher narrow_rows_launcher(int num_groups, int num_tiles);

/// Launches attention over binary codes, beside it over the exact tokens, and the combination of
/// both with the values' decoder, `[num_kv_heads][sums of a head][128]`.
cudaError_t launch_binary_attention(const binary_attention::Arguments& arguments,
                                    const float* decoder, cudaStream_t stream);

}  // namespace commvq::cuda
