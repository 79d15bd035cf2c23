#include "decode_attention/key_scores_launch.cuh"

namespace commvq::cuda {

COMMVQ_KEY_SCORES(64, Codes22, 4, 1);
COMMVQ_KEY_SCORES(64, Codes20, 4, 1);
COMMVQ_KEY_SCORES(64, NarrowCodes, 4, 1);

}  // namespace commvq::cuda
