#include "decode_attention/key_scores_launch.cuh"

namespace commvq::cuda {

KeyScoresLauncher byte_rows_launcher(int width) {
  return width == 64 ? launch_key_scores<64, AnyCodes, 8, 1>
                     : launch_key_scores<32, AnyCodes, 8, 1>;
}

}  // namespace commvq::cuda
