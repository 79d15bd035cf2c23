#pragma once

#include "decode_attention/code_reader.cuh"
#include "decode_attention/key_scores.cuh"

namespace commvq::cuda {

/// Launches one slice of keys, and beside the first one the exact tokens. Returns the launch's
/// error.
using KeyScoresLauncher = cudaError_t (*)(const key_scores::Arguments& arguments, dim3 grid,
                                          int shared_bytes, cudaStream_t stream);

/// Scores keys of any shape, or of one known at compile time (see the instantiations).
template <int kWidth, class Reader>
cudaError_t launch_key_scores(const key_scores::Arguments& arguments, dim3 grid, int shared_bytes,
                              cudaStream_t stream);

extern template cudaError_t launch_key_scores<64, AnyCodes>(const key_scores::Arguments&, dim3, int,
                                                            cudaStream_t);
extern template cudaError_t launch_key_scores<32, AnyCodes>(const key_scores::Arguments&, dim3, int,
                                                            cudaStream_t);
// 22 and 21 books of 64 rows: the paper's 1-bit shape whole, and a half of its 2-bit shape.
extern template cudaError_t launch_key_scores<64, FixedCodes<6, 22>>(const key_scores::Arguments&,
                                                                     dim3, int, cudaStream_t);
extern template cudaError_t launch_key_scores<64, FixedCodes<6, 21>>(const key_scores::Arguments&,
                                                                     dim3, int, cudaStream_t);
// 20 books: half of commvq_2bit.
extern template cudaError_t launch_key_scores<64, FixedCodes<6, 20>>(const key_scores::Arguments&,
                                                                     dim3, int, cudaStream_t);
// Few wide books.
extern template cudaError_t launch_key_scores<64, FixedCodes<7, 10>>(const key_scores::Arguments&,
                                                                     dim3, int, cudaStream_t);
extern template cudaError_t launch_key_scores<64, FixedCodes<7, 8>>(const key_scores::Arguments&,
                                                                    dim3, int, cudaStream_t);

}  // namespace commvq::cuda
