#include "decode_attention/key_scores_launch.cuh"

namespace commvq::cuda {

template cudaError_t launch_key_scores<64, FixedCodes<7, 10>>(const key_scores::Arguments&, dim3,
                                                              int, cudaStream_t);
template cudaError_t launch_key_scores<64, FixedCodes<7, 8>>(const key_scores::Arguments&, dim3,
                                                             int, cudaStream_t);

}  // namespace commvq::cuda
