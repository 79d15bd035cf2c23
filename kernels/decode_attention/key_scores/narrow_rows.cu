#include <utility>

#include "decode_attention/key_scores/launch.cuh"

namespace commvq::cuda {
namespace {

constexpr int kMostGroups = KeySlice::narrow_groups(DevicePageLayout::kMostNarrowBooks);

template <int kTiles, int... kIndices>
KeyScoresLauncher launcher_of(int num_groups, std::integer_sequence<int, kIndices...>) {
  static constexpr KeyScoresLauncher kLaunchers[] = {
      launch_key_scores<64, QuadCodes<kIndices + 1>, kTiles>...};
  return kLaunchers[num_groups - 1];
}

}  // namespace

KeyScoresLauncher narrow_rows_launcher(int num_groups, int num_tiles) {
  constexpr auto kIndices = std::make_integer_sequence<int, kMostGroups>();
  return num_tiles == 1 ? launcher_of<1>(num_groups, kIndices)
                        : launcher_of<2>(num_groups, kIndices);
}

}  // namespace commvq::cuda
