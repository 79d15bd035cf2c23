#include "decode_attention/key_scores/launch.cuh"

namespace commvq::cuda {

KeyScoresLauncher byte_rows_launcher(int width, int num_tiles) {
  if (width == 64)
    return num_tiles == 1 ? launch_key_scores<64, AnyCodes, 1> : launch_key_scores<64, AnyCodes, 2>;
  return num_tiles == 1 ? launch_key_scores<32, AnyCodes, 1> : launch_key_scores<32, AnyCodes, 2>;
}

}  // namespace commvq::cuda
