#include "decode_attention/key_scores_launch.cuh"

namespace commvq::cuda {

KeyScoresLauncher two_planes_launcher(int num_books) {
  constexpr int kLeast = DevicePageLayout::kLeastPairedBooks;
  constexpr int kMost = DevicePageLayout::kMostNarrowBooks;
  return narrow_launcher<2, kLeast, 1>(num_books,
                                       std::make_integer_sequence<int, kMost - kLeast + 1>());
}

}  // namespace commvq::cuda
