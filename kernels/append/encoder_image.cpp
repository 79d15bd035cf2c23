#include "encoder_image.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "commvq/core/error.hpp"

#include "binary_search_tables.hpp"
#include "key_search_tables.hpp"
#include "operands.hpp"
#include "search_stage.hpp"
#include "search_stages.hpp"

namespace commvq::cuda {
namespace {

/// The codebooks with weights applied to their rows.
std::vector<KeyCodebook<float>> weighted_codebooks(const KeyCodec& codec) {
  std::vector<KeyCodebook<float>> codebooks;
  for (int head = 0; head < codec.num_kv_heads(); ++head) {
    KeyCodebook<float>& codebook = codebooks.emplace_back(codec.codebook(head));
    if (codec.is_weighted()) codebook.rows = codebook.scaled_rows(codebook.pair_weights);
  }
  return codebooks;
}

/// Whether every second book is j times the first, exactly.
bool are_books_tied(const KeyCodebook<float>& codebook) {
  KeyCodebook<float> tied = codebook;
  tied.derive_tied_books();
  return tied.rows == codebook.rows;
}

bool has_binary_search(const KeyCodecConfig& config, const DevicePageLayout& layout) {
  return config.codebook_size == 2 && config.num_groups() == 1 && layout.num_planes == 1 &&
         config.num_stages % 4 == 0 && config.num_stages <= kMaxBinaryStages &&
         config.beam_width <= kMaxBinaryBeam;
}

bool has_warpgroup_search(const KeyCodecConfig& config) {
  return config.beam_width <= kMaxSearchBeam && config.codebook_size == SearchStage<true>::kSize &&
         2 * config.group_pairs == SearchStage<true>::kWidth;
}

/// What the operands of the value networks can be at most.
struct NetworkBounds {
  double input = 0;   ///< LayerNorm's output: sqrt(C) before gain and bias
  double hidden = 0;  ///< what the inputs can add up to

  explicit NetworkBounds(const ValueCodec& codec) {
    const ValueCodecWeights& weights = codec.weights();
    const ValueCodecConfig config = codec.config().block();
    const auto C = static_cast<std::size_t>(config.num_channels);
    const auto H = static_cast<std::size_t>(config.hidden_size);
    const double length = std::sqrt(static_cast<double>(C));
    for (std::size_t c = 0; c < weights.norm_gain.size(); ++c)
      input =
          std::max(input, length * std::abs(weights.norm_gain[c]) + std::abs(weights.norm_bias[c]));
    // |sum_c w_c (gain_c x_c + bias_c)| with |x| <= sqrt(C): Cauchy-Schwarz.
    for (std::size_t h = 0; h < weights.hidden_bias.size(); ++h) {
      double squares = 0, rest = weights.hidden_bias[h];
      for (std::size_t c = 0; c < C; ++c) {
        const double w = weights.hidden_weight[h * C + c];
        squares += std::pow(w * weights.norm_gain[h / H * C + c], 2);
        rest += w * weights.norm_bias[h / H * C + c];
      }
      hidden = std::max(hidden, length * std::sqrt(squares) + std::abs(rest));
    }
  }
};

/// E of the values divided by their channel scales, [blocks][num_code_bits][C].
std::vector<float> encoder_rows(const ValueCodec& codec) {
  std::vector<float> rows = codec.weights().decoder;
  if (!codec.is_scaled()) return rows;
  const std::vector<float>& scales = codec.weights().channel_scales;
  const ValueCodecConfig config = codec.config().block();
  const auto C = static_cast<std::size_t>(config.num_channels);
  const auto bits = static_cast<std::size_t>(config.num_code_bits());
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] /= scales[i / (bits * C) * C + i % C];
  return rows;
}

}  // namespace

EncoderImage::EncoderImage(const LayerCodec& codec, const DevicePageLayout& layout,
                           ValuePrecision precision, bool by_warpgroups) {
  require(codec.keys != nullptr && codec.values != nullptr,
          "the device encoder needs a codec for both keys and values; the ",
          codec.keys == nullptr ? "keys" : "values", " have none");
  const KeyCodecConfig& keys = codec.keys->config();
  const ValueCodecConfig& values = codec.values->config();
  require(
      codec.keys->num_kv_heads() == layout.num_kv_heads && keys.pairs.head_dim == layout.head_dim &&
          keys.codebook_size == layout.codebook_size && keys.num_groups() == layout.num_groups &&
          2 * keys.num_stages == layout.num_books,
      "the key codec (", codec.keys->num_kv_heads(), " heads of ", keys.pairs.head_dim, ", ",
      keys.num_groups(), " groups of ", keys.num_stages, " stages of ", keys.codebook_size,
      " centroids) differs from the page layout's: ", layout.num_kv_heads, ", ", layout.head_dim,
      ", ", layout.num_groups, ", ", layout.num_books / 2, ", ", layout.codebook_size);
  require(values.num_code_bits() == layout.num_code_bits &&
              values.num_blocks == layout.value_blocks &&
              values.num_channels == layout.num_kv_heads * layout.head_dim,
          "the value codec (", values.num_channels, " channels, ", values.num_code_bits(),
          " bits, num_blocks ", values.num_blocks,
          ") differs from the page layout's: ", layout.num_kv_heads * layout.head_dim, ", ",
          layout.num_code_bits, ", ", layout.value_blocks);
  require(layout.norms_per_token == 1 || layout.norms_per_token == layout.num_kv_heads,
          "norms_per_token is ", layout.norms_per_token,
          "; it must be 1 or num_kv_heads = ", layout.num_kv_heads);
  require(keys.beam_width <= kMaxBeamWidth, "beam_width is ", keys.beam_width,
          "; the device searches up to ", kMaxBeamWidth);
  require(keys.num_stages <= kMaxStages, "num_stages is ", keys.num_stages,
          "; the device supports up to ", kMaxStages);
  require(keys.codebook_size <= kMaxCodebookSize, "codebook_size is ", keys.codebook_size,
          "; the device supports up to ", kMaxCodebookSize);
  view_.layout = layout;
  add_keys(*codec.keys, by_warpgroups);
  add_values(*codec.values, precision);
}

template <class T>
void EncoderImage::add(const T*& at, const std::vector<T>& values) {
  const std::size_t offset = (bytes_.size() + 255) / 256 * 256;
  bytes_.resize(offset + values.size() * sizeof(T));
  std::memcpy(bytes_.data() + offset, values.data(), values.size() * sizeof(T));
  at = reinterpret_cast<const T*>(static_cast<std::uintptr_t>(offset));
}

void EncoderImage::add_keys(const KeyCodec& codec, bool by_warpgroups) {
  const KeyCodecConfig& config = codec.config();
  KeyEncoderView& keys = view_.keys;
  keys.group_pairs = config.group_pairs;
  keys.row_size = 2 * config.group_pairs;
  keys.padded_row_size = static_cast<int>(round_up(keys.row_size, 16));
  keys.num_stages = config.num_stages;
  keys.codebook_size = config.codebook_size;
  keys.padded_books = static_cast<int>(round_up(2 * config.codebook_size, 8));
  keys.padded_size = static_cast<int>(round_up(config.codebook_size, 64));
  keys.beam_width = config.beam_width;

  const std::vector<KeyCodebook<float>> codebooks = weighted_codebooks(codec);
  std::vector<float> key_weights;
  for (const KeyCodebook<float>& codebook : codebooks)
    for (int part = 0; part < 2; ++part)
      key_weights.insert(key_weights.end(), codebook.pair_weights.begin(),
                         codebook.pair_weights.end());
  const double largest_weight = codec.is_weighted() ? largest_of(key_weights) : 1;

  // Numbers of a residual are at most the weight and the largest number of every row taken off.
  double largest_number = 0, largest_residual = largest_weight;
  const std::size_t book = static_cast<std::size_t>(keys.codebook_size) * keys.row_size;
  for (int head = 0; head < codec.num_kv_heads(); ++head) {
    const KeyCodebook<float>& codebook = codebooks[static_cast<std::size_t>(head)];
    double residual = largest_weight;
    for (int group = 0; group < config.num_groups(); ++group) {
      double sum = largest_weight;
      for (int b = 0; b < 2 * keys.num_stages; ++b) {
        const float* const first = codebook.book(group, b / 2, b % 2);
        const double largest = largest_of(std::vector<float>(first, first + book));
        sum += largest;
        largest_number = std::max(largest_number, largest);
      }
      residual = std::max(residual, sum);
    }
    largest_residual = std::max(largest_residual, residual);
    require(std::isfinite(residual) && !codebook.rows.empty(), "the codebook of head ", head,
            " is empty or too large");
  }
  const double row_scale = scale_for(largest_number);
  const double residual_scale = scale_for(largest_residual);
  keys.residual_scale = static_cast<float>(residual_scale);
  keys.product_factor = static_cast<float>(-2 / (residual_scale * row_scale));

  std::vector<std::uint16_t> channels;
  for (int part = 0; part < 2; ++part)
    for (int pair = 0; pair < config.pairs.num_pairs(); ++pair)
      channels.push_back(static_cast<std::uint16_t>(part == 0 ? config.pairs.real_channel(pair)
                                                              : config.pairs.imag_channel(pair)));
  add(keys.channels, channels);
  if (!key_weights.empty()) add(keys.weights, key_weights);
  if (has_binary_search(config, view_.layout))
    add_binary_search(codebooks, largest_weight);
  else if (by_warpgroups && has_warpgroup_search(config))
    add_search_stages(codebooks, residual_scale);
  else
    add_key_search(codebooks, row_scale);
}

void EncoderImage::add_key_search(const std::vector<KeyCodebook<float>>& codebooks,
                                  double row_scale) {
  KeyEncoderView& keys = view_.keys;
  const KeySearchTables tables(codebooks, keys, row_scale);
  add(keys.rows, tables.rows);
  add(keys.operands, tables.operands);
  add(keys.squared_norms, tables.squared_norms);
  add(keys.cross_terms, tables.cross_terms);
  add(keys.cross_terms_by_b, tables.cross_terms_by_b);
  add(keys.cross_units, tables.cross_units);
  if (keys.screens()) add(keys.rounded_cross_terms, tables.rounded_cross_terms);
}

void EncoderImage::add_search_stages(const std::vector<KeyCodebook<float>>& codebooks,
                                     double scale) {
  KeyEncoderView& keys = view_.keys;
  keys.books_are_tied = std::all_of(codebooks.begin(), codebooks.end(), are_books_tied);
  keys.search_factor = static_cast<float>(-2 / (scale * scale));
  const SearchStages stages(codebooks, keys.books_are_tied, scale);
  add(keys.search_stages, stages.image);
  add(keys.cross_terms, stages.cross_terms);
}

void EncoderImage::add_binary_search(const std::vector<KeyCodebook<float>>& codebooks,
                                     double largest_key) {
  const BinarySearchTables tables(codebooks);
  BinarySearchView& binary = view_.keys.binary;
  binary.num_bytes = codebooks[0].config.num_stages / 4;
  const double key_scale = scale_for(largest_key);
  binary.key_scale = static_cast<float>(key_scale);
  binary.key_factor = static_cast<float>(-2 / (key_scale * tables.direction_scale));
  binary.gram_factor = static_cast<float>(1 / tables.gram_scale);
  add(binary.directions, tables.directions);
  add(binary.offsets, tables.offsets);
  add(binary.grams, tables.grams);
  add(binary.steps, tables.steps);
}

/// `weights` is [blocks][outputs][inputs]; its operand is padded with zeros on both sides.
Weights EncoderImage::add_weights(const std::vector<float>& weights, Index outputs, Index inputs,
                                  double input_scale, ValuePrecision precision) {
  Weights result;
  result.num_inputs = static_cast<int>(round_up(inputs, kInputPadding));
  result.num_outputs = static_cast<int>(outputs);
  result.num_padded_outputs = static_cast<int>(round_up(outputs, kOutputPadding));
  const double scale = scale_for(largest_of(weights));
  result.product_factor = static_cast<float>(1 / (scale * input_scale));
  const Index num_blocks = view_.values.num_blocks;
  const auto count =
      static_cast<std::size_t>(num_blocks * result.num_padded_outputs * result.num_inputs);
  std::vector<std::uint16_t> hi(count), lo(count);
  for (Index row = 0; row < num_blocks * outputs; ++row)
    for (Index i = 0; i < inputs; ++i) {
      const Index padded_row = row / outputs * result.num_padded_outputs + row % outputs;
      const auto at = static_cast<std::size_t>(padded_row * result.num_inputs + i);
      const Halves halves(double{weights[static_cast<std::size_t>(row * inputs + i)]} * scale);
      hi[at] = halves.hi;
      lo[at] = halves.lo;
    }
  add(result.hi, hi);
  // Offset 0 is that of the first array, so that null remains null.
  if (precision == ValuePrecision::kFp32) add(result.lo, lo);
  return result;
}

void EncoderImage::add_values(const ValueCodec& codec, ValuePrecision precision) {
  const ValueCodecConfig config = codec.config().block();
  const ValueCodecWeights& weights = codec.weights();
  ValueEncoderView& values = view_.values;
  values.num_blocks = codec.config().num_blocks;
  values.num_channels = config.num_channels;
  values.num_code_bits = config.num_code_bits();
  if (codec.is_scaled()) add(values.channel_scales, weights.channel_scales);
  add(values.norm_gain, weights.norm_gain);
  add(values.norm_bias, weights.norm_bias);

  const Index C = config.num_channels, H = config.hidden_size;
  const NetworkBounds bounds(codec);
  const double input_scale = scale_for(bounds.input), hidden_scale = scale_for(bounds.hidden);
  values.input_scale = static_cast<float>(input_scale);
  values.hidden_scale = static_cast<float>(hidden_scale);
  values.hidden = add_weights(weights.hidden_weight, H, C, input_scale, precision);
  values.output =
      add_weights(weights.output_weight, config.num_logits(), H, hidden_scale, precision);
  add_bias(values.hidden, weights.hidden_bias);
  add_bias(values.output, weights.output_bias);

  const std::vector<float> rows = encoder_rows(codec);
  const Index bits = config.num_code_bits();
  std::vector<float> transposed(rows.size());
  for (Index row = 0; row < values.num_blocks * bits; ++row)
    for (Index c = 0; c < C; ++c)
      transposed[static_cast<std::size_t>((row / bits * C + c) * bits + row % bits)] =
          rows[static_cast<std::size_t>(row * C + c)];
  values.decoder = add_weights(transposed, C, bits, 1, precision);
  values.length_factor = 1 / scale_for(largest_of(transposed));
  if (config.polish_sweeps > 0) add_polish(codec, rows);
}

/// `bias` is [blocks][num_outputs]; it is padded with zeros as the weights are.
void EncoderImage::add_bias(Weights& weights, const std::vector<float>& bias) {
  const auto outputs = static_cast<std::size_t>(weights.num_outputs);
  const auto padded_outputs = static_cast<std::size_t>(weights.num_padded_outputs);
  std::vector<float> padded(bias.size() / outputs * padded_outputs);
  for (std::size_t i = 0; i < bias.size(); ++i)
    padded[i / outputs * padded_outputs + i % outputs] = bias[i];
  add(weights.bias, padded);
}

/// Always in two fp16 numbers an operand: flips must not follow from rounding. `rows` are E.
void EncoderImage::add_polish(const ValueCodec& codec, const std::vector<float>& rows) {
  const ValueCodecConfig config = codec.config().block();
  const Index bits = config.num_code_bits(), C = config.num_channels;
  ValueEncoderView& values = view_.values;
  values.polish_sweeps = config.polish_sweeps;
  values.graded = config.graded;
  values.unit_scale = static_cast<float>(scale_for(1));
  const std::vector<float> gram(codec.gram().data,
                                codec.gram().data + codec.gram().rows * codec.gram().cols);
  values.rows = add_weights(rows, bits, C, values.unit_scale, ValuePrecision::kFp32);
  values.gram = add_weights(gram, bits, bits, 1, ValuePrecision::kFp32);
  add(values.gram_rows, gram);
}

EncoderView EncoderImage::view_at(const void* base) const {
  EncoderView view = view_;
  const auto at = [&](auto* offset) {
    return reinterpret_cast<decltype(offset)>(reinterpret_cast<std::uintptr_t>(base) +
                                              reinterpret_cast<std::uintptr_t>(offset));
  };
  const auto place = [&](auto*&... pointers) {
    ((pointers = pointers == nullptr ? nullptr : at(pointers)), ...);
  };
  KeyEncoderView& keys = view.keys;
  keys.channels = at(keys.channels);  // the first array: its offset is 0
  place(keys.weights, keys.rows, keys.operands, keys.squared_norms, keys.cross_terms,
        keys.cross_terms_by_b, keys.cross_units, keys.rounded_cross_terms, keys.search_stages,
        keys.binary.directions, keys.binary.offsets, keys.binary.grams, keys.binary.steps);
  ValueEncoderView& values = view.values;
  place(values.channel_scales, values.norm_gain, values.norm_bias, values.gram_rows);
  for (Weights* weights :
       {&values.hidden, &values.output, &values.decoder, &values.rows, &values.gram})
    place(weights->hi, weights->lo, weights->bias);
  return view;
}

}  // namespace commvq::cuda
