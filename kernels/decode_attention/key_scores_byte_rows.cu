#include "decode_attention/key_scores_launch.cuh"

namespace commvq::cuda {

KeyScoresLauncher byte_rows_launcher(int width) {
  return width == 64 ? launch_key_scores<64, AnyCodes> : launch_key_scores<32, AnyCodes>;
}

}  // namespace commvq::cuda
