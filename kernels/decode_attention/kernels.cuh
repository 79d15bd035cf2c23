#pragma once

#include "decode_attention/binary/shape.cuh"
#include "decode_attention/code_reader.cuh"
#include "decode_attention/key_scores.cuh"

namespace commvq::cuda {

/// Launches one slice of keys, and beside the first one the exact tokens. Returns the launch's
/// error.
using KeyScoresLauncher = cudaError_t (*)(const key_scores::Arguments& arguments, dim3 grid,
                                          int shared_bytes, cudaStream_t stream);

/// Scores keys of any shape, or of one known at compile time (see the instantiations): rows of
/// kWidth pairs in kRowBits bits, kPlanes planes at once.
template <int kWidth, class Reader, int kRowBits = 8, int kPlanes = 1>
cudaError_t launch_key_scores(const key_scores::Arguments& arguments, dim3 grid, int shared_bytes,
                              cudaStream_t stream);

#define COMMVQ_KEY_SCORES(...)                                                                 \
  template cudaError_t launch_key_scores<__VA_ARGS__>(const key_scores::Arguments&, dim3, int, \
                                                      cudaStream_t)

extern COMMVQ_KEY_SCORES(64, AnyCodes);
extern COMMVQ_KEY_SCORES(32, AnyCodes);
// Books of 64 rows in 4 bits: 22 of the 1-bit presets and twice 21 or 20 of the 2-bit ones; where
// stages are spread, twice 22 are the most of the former and 20 the least of the latter; and any
// number.
using Codes22 = FixedCodes<6, 22>;
using Codes21 = FixedCodes<6, 21>;
using Codes20 = FixedCodes<6, 20>;
using NarrowCodes = CodesUpTo<6, DevicePageLayout::kMostNarrowBooks>;
extern COMMVQ_KEY_SCORES(64, Codes22, 4, 1);
extern COMMVQ_KEY_SCORES(64, Codes20, 4, 1);
extern COMMVQ_KEY_SCORES(64, NarrowCodes, 4, 1);
extern COMMVQ_KEY_SCORES(64, Codes22, 4, 2);
extern COMMVQ_KEY_SCORES(64, Codes21, 4, 2);
extern COMMVQ_KEY_SCORES(64, Codes20, 4, 2);
extern COMMVQ_KEY_SCORES(64, NarrowCodes, 4, 2);

/// Launches attention over binary codes, and beside it over the exact tokens.
cudaError_t launch_binary_attention(const binary_attention::Arguments& arguments, dim3 grid,
                                    cudaStream_t stream);

}  // namespace commvq::cuda
