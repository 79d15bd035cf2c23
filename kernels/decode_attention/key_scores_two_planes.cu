#include "decode_attention/key_scores_launch.cuh"

namespace commvq::cuda {

COMMVQ_KEY_SCORES(64, Codes22, 4, 2);
COMMVQ_KEY_SCORES(64, Codes21, 4, 2);
COMMVQ_KEY_SCORES(64, Codes20, 4, 2);
COMMVQ_KEY_SCORES(64, NarrowCodes, 4, 2);

}  // namespace commvq::cuda
