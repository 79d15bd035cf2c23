#include "decode_attention/key_scores_launch.cuh"

namespace commvq::cuda {

COMMVQ_KEY_SCORES(64, AnyCodes);
COMMVQ_KEY_SCORES(32, AnyCodes);

}  // namespace commvq::cuda
