#include "decode_attention/key_scores_launch.cuh"

namespace commvq::cuda {

COMMVQ_KEY_SCORES(64, WideCodes10);
COMMVQ_KEY_SCORES(64, WideCodes8);

}  // namespace commvq::cuda
