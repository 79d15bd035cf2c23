#include "decode_attention/key_scores_launch.cuh"

namespace commvq::cuda {

template <int kWidth>
cudaError_t launch_byte_key_scores(const key_scores::Arguments& arguments, dim3 grid,
                                   int shared_bytes, cudaStream_t stream) {
  return launch_key_scores<kWidth, AnyCodes, 8, 1>(arguments, grid, shared_bytes, stream);
}
template cudaError_t launch_byte_key_scores<64>(const key_scores::Arguments&, dim3, int,
                                                cudaStream_t);
template cudaError_t launch_byte_key_scores<32>(const key_scores::Arguments&, dim3, int,
                                                cudaStream_t);

}  // namespace commvq::cuda
