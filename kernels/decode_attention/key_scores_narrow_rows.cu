#include <utility>

#include "decode_attention/key_scores_launch.cuh"

namespace commvq::cuda {
namespace {

constexpr int kMostGroups = KeySlice::narrow_groups(DevicePageLayout::kMostNarrowBooks);

template <int... kIndices>
KeyScoresLauncher launcher_of(int num_groups, std::integer_sequence<int, kIndices...>) {
  static constexpr KeyScoresLauncher kLaunchers[] = {
      launch_key_scores<64, StageCodes<kIndices + 1>>...};
  return kLaunchers[num_groups - 1];
}

}  // namespace

KeyScoresLauncher narrow_rows_launcher(int num_groups) {
  return launcher_of(num_groups, std::make_integer_sequence<int, kMostGroups>());
}

}  // namespace commvq::cuda
