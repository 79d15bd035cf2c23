#include "decode_attention/key_scores_launch.cuh"

namespace commvq::cuda {

KeyScoresLauncher one_plane_launcher(int num_books) {
  constexpr int kMost = DevicePageLayout::kMostNarrowBooks;
  return narrow_launcher<1, 2, 2>(num_books, std::make_integer_sequence<int, kMost / 2>());
}

}  // namespace commvq::cuda
