#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <vector>

#include "commvq/core/error.hpp"
#include "commvq/core/float16.hpp"
#include "commvq/cuda/device_codebooks.hpp"
#include "commvq/cuda/integer_codebook.hpp"
#include "commvq/io/codebook_file.hpp"
#include "commvq/rope/rope.hpp"

#include "common/device_memory.hpp"
#include "decode_attention/binary/shared_bytes.hpp"
#include "prepare/binary_keys.hpp"

namespace commvq::cuda {
namespace {

/// Gathers arrays in host memory, each on 256 bytes, to be copied to the device at once.
class Image {
 public:
  template <class T>
  Index add(const std::vector<T>& values) {
    const Index offset = (static_cast<Index>(bytes_.size()) + 255) / 256 * 256;
    bytes_.resize(static_cast<std::size_t>(offset) + values.size() * sizeof(T));
    std::memcpy(bytes_.data() + offset, values.data(), values.size() * sizeof(T));
    return offset;
  }
  const std::vector<std::uint8_t>& bytes() const { return bytes_; }

 private:
  std::vector<std::uint8_t> bytes_;
};

/// Offsets of one slice's arrays in the image.
struct SliceOffsets {
  Index rows, units, zero_points, line_weights, token_turns;
};

/// See `KeySlice::token_turns`.
std::vector<std::uint16_t> token_turns_of(const Rope& rope, const KeySlice& slice) {
  std::vector<std::uint16_t> turns;
  std::vector<double> rotation(2 * static_cast<std::size_t>(rope.pairs().num_pairs()));
  for (int token = 0; token < KeySlice::kTurnTokens; ++token) {
    rope.rotation_at(token, rotation.data());
    for (int word = 0; word < slice.width / 2; ++word)  // k, then thread
      for (int part = 0; part < 2; ++part)
        for (int e = 0; e < 2; ++e) {
          const int pair = 2 * word + e;
          const double turn = pair < slice.num_pairs
                                  ? rotation[static_cast<std::size_t>(
                                        part * rope.pairs().num_pairs() + slice.first_pair + pair)]
                                  : 1.0 - part;
          turns.push_back(to_fp16(static_cast<float>(turn)));
        }
  }
  return turns;
}

SliceOffsets add_slice(const KeyCodec& codec, const Rope& rope, const DevicePageLayout& layout,
                       KeySlice& slice, Image& image) {
  std::vector<std::int8_t> rows;
  std::vector<float> units;
  std::vector<std::uint16_t> zero_points;
  std::vector<std::uint8_t> line_weights;
  const auto append = [](auto& to, const auto& from) {
    to.insert(to.end(), from.begin(), from.end());
  };
  for (int head = 0; head < layout.num_kv_heads; ++head) {
    const IntegerKeySlice integers(codec.codebook(head), layout, slice.plane, slice.first_pair,
                                   slice.num_pairs);
    slice.num_books = integers.num_books;
    append(rows, integers.image());
    append(zero_points, integers.zero_points());
    append(units, integers.units);
    std::vector<int> weights = integers.line_weights();
    weights.resize(KeySlice::kNarrowWeights);
    append(line_weights, weights);
  }
  slice.row_bytes = static_cast<Index>(rows.size()) / layout.num_kv_heads;
  return {image.add(rows), image.add(units), image.add(zero_points), image.add(line_weights),
          image.add(token_turns_of(rope, slice))};
}

/// Adds all slices of the codec to the view and the image.
std::vector<SliceOffsets> add_slices(const KeyCodec& keys, const Rope& rope, CodebooksView& view,
                                     Image& image) {
  const int g = keys.config().group_pairs;
  const int width = slice_width(keys.config());
  std::vector<SliceOffsets> offsets;
  for (int plane = 0; plane < view.layout.num_planes; plane += view.layout.planes_at_once) {
    for (int first = 0; first < g; first += width) {
      require(view.num_slices < CodebooksView::kMaxSlices, "the key codec needs more than ",
              CodebooksView::kMaxSlices, " slices on the device; use larger groups");
      KeySlice& slice = view.slices[view.num_slices++];
      slice.plane = plane;
      slice.row_bits = view.layout.key_row_bits;
      slice.first_pair = view.layout.planes[plane].group * g + first;
      slice.num_pairs = std::min(width, g - first);
      slice.width = width;
      offsets.push_back(add_slice(keys, rope, view.layout, slice, image));
    }
  }
  return offsets;
}

void point_to(const std::uint8_t* base, const SliceOffsets& at, KeySlice& slice) {
  slice.rows = reinterpret_cast<const std::int8_t*>(base + at.rows);
  slice.units = reinterpret_cast<const float*>(base + at.units);
  slice.zero_points = reinterpret_cast<const std::uint32_t*>(base + at.zero_points);
  slice.line_weights = base + at.line_weights;
  slice.token_turns = reinterpret_cast<const std::uint32_t*>(base + at.token_turns);
}

/// Offsets of the arrays of binary keys in the image.
struct BinaryOffsets {
  Index high_entries, low_entries, turns, node_weights, high_factors, low_factors;
};

BinaryOffsets add_binary(const KeyCodec& keys, const Rope& rope, CodebooksView& view,
                         Image& image) {
  const BinaryKeyImage binary(keys, rope, view.layout);
  view.binary = binary.keys;
  const int needed = binary_attention_bytes(view.binary);
  const int most = attribute_of_current_device(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  require(needed <= most, "attention over these binary codes (", view.layout.num_books,
          " bits a head, RoPE's theta ", rope.config().theta, ") takes ", needed,
          " bytes of shared memory a block; the device has ", most,
          ": fewer bits or a larger theta take less");
  return {image.add(binary.high_entries), image.add(binary.low_entries),
          image.add(binary.turns),        image.add(binary.node_weights),
          image.add(binary.high_factors), image.add(binary.low_factors)};
}

void point_to(const std::uint8_t* base, const BinaryOffsets& at, BinaryKeys& keys) {
  keys.high_entries = reinterpret_cast<const std::uint32_t*>(base + at.high_entries);
  keys.low_entries = reinterpret_cast<const std::uint32_t*>(base + at.low_entries);
  keys.turns = reinterpret_cast<const std::uint32_t*>(base + at.turns);
  keys.node_weights = reinterpret_cast<const float*>(base + at.node_weights);
  keys.high_factors = reinterpret_cast<const float*>(base + at.high_factors);
  keys.low_factors = reinterpret_cast<const float*>(base + at.low_factors);
}

/// Angle of one position of every pair as a 64-bit fraction of a turn.
std::vector<std::uint64_t> turns_of(const Rope& rope) {
  std::vector<std::uint64_t> turns;
  for (int pair = 0; pair < rope.pairs().num_pairs(); ++pair) {
    const double turn = rope.frequency(pair) / (2 * std::numbers::pi);
    turns.push_back(static_cast<std::uint64_t>(std::ldexp(turn - std::floor(turn), 64)));
  }
  return turns;
}

/// Rows of the values' decoder that sums are multiplied with.
std::vector<float> decoder_of(const ValueCodec& values, const DevicePageLayout& layout) {
  const MatrixView<const float> rows = values.decoder();
  std::vector<float> decoder;
  for (int bit = 0; bit < layout.num_code_bits; ++bit)
    if (!layout.graded || graded_bit(bit).weight == 1)
      decoder.insert(decoder.end(), rows.row(bit), rows.row(bit) + rows.cols);
  return decoder;
}

std::vector<std::uint16_t> channels_of(const PairLayout& pairs) {
  std::vector<std::uint16_t> channels;
  for (int pair = 0; pair < pairs.num_pairs(); ++pair)
    channels.push_back(static_cast<std::uint16_t>(pairs.real_channel(pair)));
  for (int pair = 0; pair < pairs.num_pairs(); ++pair)
    channels.push_back(static_cast<std::uint16_t>(pairs.imag_channel(pair)));
  return channels;
}

Index plane_bytes_of_current_device() {
  const int major = attribute_of_current_device(cudaDevAttrComputeCapabilityMajor);
  const int minor = attribute_of_current_device(cudaDevAttrComputeCapabilityMinor);
  require(major >= 8, "the device has compute capability ", major, ".", minor,
          "; the kernels need 8.0 or later");
  return key_plane_bytes(major * 10 + minor);
}

}  // namespace

DeviceCodebooks prepare(const LayerCodec& codec, const RopeConfig& rope, int page_size) {
  require(codec.keys != nullptr && codec.values != nullptr,
          "the device backend needs a codec for both keys and values; the ",
          codec.keys == nullptr ? "keys" : "values", " have none");
  const KeyCodec& keys = *codec.keys;
  require(keys.config().pairs == rope.pairs, "the key codec's head_dim ",
          keys.config().pairs.head_dim, ", rotary_dim ", keys.config().pairs.rotary_dim,
          " or layout differs from the RoPE's: ", rope.pairs.head_dim, ", ", rope.pairs.rotary_dim);
  DeviceCodebooks result;
  CodebooksView& view = result.view_;
  view.layout = DevicePageLayout(keys.config(), keys.num_kv_heads(), codec.values->config(),
                                 page_size, plane_bytes_of_current_device());

  view.num_multiprocessors = attribute_of_current_device(cudaDevAttrMultiProcessorCount);

  Image image;
  std::vector<SliceOffsets> slices;
  BinaryOffsets binary{};
  if (view.layout.is_binary()) {
    binary = add_binary(keys, Rope(rope), view, image);
  } else {
    slices = add_slices(keys, Rope(rope), view, image);
  }
  const Index turns = image.add(turns_of(Rope(rope)));
  const Index channels = image.add(channels_of(rope.pairs));
  const Index decoder = image.add(decoder_of(*codec.values, view.layout));

  result.memory_ = copy_to_device(image.bytes(), "codebooks");
  const auto* const base = static_cast<const std::uint8_t*>(result.memory_.get());
  for (int i = 0; i < view.num_slices; ++i)
    point_to(base, slices[static_cast<std::size_t>(i)], view.slices[i]);
  if (view.layout.is_binary()) point_to(base, binary, view.binary);
  view.turns = reinterpret_cast<const std::uint64_t*>(base + turns);
  view.channels = reinterpret_cast<const std::uint16_t*>(base + channels);
  view.decoder = reinterpret_cast<const float*>(base + decoder);
  return result;
}

}  // namespace commvq::cuda
