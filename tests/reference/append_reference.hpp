#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "commvq/core/float16.hpp"
#include "commvq/cuda/page_layout.hpp"
#include "commvq/io/codebook_file.hpp"
#include "commvq/key_codec/key_codec.hpp"
#include "commvq/value_codec/value_codec.hpp"

#include "reference/random_cache.hpp"

/// Inputs for `append`, and what it must write, judged in double precision.
namespace commvq::testing_support {

struct AppendShape {
  int num_kv_heads = 2;
  int head_dim = 64;
  Index num_tokens = 40;
  int group_pairs = 0;  ///< 0: as the paper
  int codebook_size = 16;
  int num_stages = 4;
  bool tied = true;
  int beam_width = 1;
  RopeLayout layout = RopeLayout::kHalfSplit;
  int page_size = 64;
  int bits = 1;
  int hidden_size = 96;
  Index plane_bytes = 176 * 1024;  ///< less: more planes
  bool norm_per_head = false;      ///< random input only
  bool weighted = false;           ///< errors of keys
  int polish_sweeps = 0;           ///< of value codes
  int value_blocks = 1;
  bool scaled_values = false;  ///< channel scales, powers of two
  bool graded = false;         ///< keys and values
  bool graded_values = false;  ///< values alone
};

/// A token as a page holds it.
struct CodedToken {
  std::vector<std::uint16_t> key_codes;
  std::vector<std::uint16_t> key_norms;
  std::vector<std::uint8_t> value_code;
  std::vector<std::uint16_t> value_scales;
};

inline bool is_nan_bf16(std::uint16_t bits) {
  return std::isnan(from_bf16(bits));
}

struct AppendCase {
  AppendShape shape;
  LayerCodec codec;
  cuda::DevicePageLayout layout;
  Index num_tokens = 0;
  std::vector<float> keys, values;  ///< [num_tokens][channels]
  std::vector<std::int64_t> slot_mapping;
  std::vector<std::uint8_t> noise;  ///< pages before the call
  bool is_exact = false;

  int num_channels() const { return shape.num_kv_heads * shape.head_dim; }
  const float* key(Index token) const { return keys.data() + token * num_channels(); }
  const float* value(Index token) const { return values.data() + token * num_channels(); }

  /// Keys, values, key codebooks and decoder in multiples of powers of two, so small that every sum
  /// is exact in fp32, and keys whose norms are powers of two. Ties are frequent.
  static AppendCase exact(Rng& rng, const AppendShape& shape) {
    return AppendCase(rng, shape, true);
  }
  static AppendCase random(Rng& rng, const AppendShape& shape) {
    return AppendCase(rng, shape, false);
  }

  AppendCase(Rng& rng, const AppendShape& shape_, bool exact_)
      : shape(shape_), num_tokens(shape_.num_tokens), is_exact(exact_) {
    const PairLayout pairs{shape.head_dim, shape.head_dim, shape.layout};
    KeyCodecConfig config = KeyCodecConfig::paper_1bit(pairs);
    if (shape.group_pairs > 0) config.group_pairs = shape.group_pairs;
    config.codebook_size = shape.codebook_size;
    config.num_stages = shape.num_stages;
    config.tied = shape.tied;
    config.beam_width = shape.beam_width;
    config.norm_per_head = shape.norm_per_head;
    config.graded = shape.graded;
    if (is_exact) {
      int exponent = 0;
      while ((1 << 2 * exponent) < num_channels()) ++exponent;
      const double unit = std::ldexp(1.0, -exponent);  // of a unit key
      std::vector<KeyCodebook<float>> heads;
      for (int head = 0; head < shape.num_kv_heads; ++head) {
        KeyCodebook<float>& codebook = heads.emplace_back(config);
        std::uniform_int_distribution<int> number(-3, 3);
        for (float& value : codebook.rows) value = static_cast<float>(number(rng) * unit / 4);
        if (config.tied) codebook.derive_tied_books();
        if (config.graded) codebook.derive_graded_rows();
        if (shape.weighted)
          for (int pair = 0; pair < pairs.num_pairs(); ++pair)
            codebook.pair_weights.push_back(std::ldexp(1.0f, static_cast<int>(rng() % 3) - 1));
      }
      codec.keys = std::make_shared<const KeyCodec>(std::move(heads));
      keys = integers_of_norm(rng, 1 << 2 * exponent);
      values = integers_of_norm(rng, 1 << 2 * exponent);
    } else {
      codec.keys = random_key_codec(rng, config, shape.num_kv_heads);
      if (shape.weighted) add_weights(rng);
      keys = normal_floats(rng, num_tokens * num_channels(), 2.0);
      values = normal_floats(rng, num_tokens * num_channels(), 0.5);
    }
    codec.values = random_value_codec(rng, num_channels(), shape.bits, shape.hidden_size,
                                      shape.value_blocks, shape.graded || shape.graded_values);
    ValueCodecConfig value_config = codec.values->config();
    value_config.polish_sweeps = shape.polish_sweeps;
    ValueCodecWeights weights = codec.values->weights();
    std::uniform_int_distribution<int> number(-2, 2);
    if (is_exact)
      for (float& value : weights.decoder) value = static_cast<float>(number(rng));
    if (value_config.graded) weights.derive_graded_rows(value_config.block().num_channels);
    if (shape.scaled_values)
      for (int c = 0; c < num_channels(); ++c)
        weights.channel_scales.push_back(std::ldexp(1.0f, static_cast<int>(rng() % 3) - 1));
    codec.values = std::make_shared<const ValueCodec>(value_config, std::move(weights));
    layout = cuda::DevicePageLayout(codec.keys->config(), shape.num_kv_heads,
                                    codec.values->config(), shape.page_size, shape.plane_bytes);
    scatter(rng);
  }

  /// Weights between a half and two.
  void add_weights(Rng& rng) {
    std::uniform_real_distribution<float> weight(0.5f, 2.0f);
    std::vector<KeyCodebook<float>> heads;
    for (int head = 0; head < shape.num_kv_heads; ++head) {
      KeyCodebook<float>& codebook = heads.emplace_back(codec.keys->codebook(head));
      for (int pair = 0; pair < codebook.config.pairs.num_pairs(); ++pair)
        codebook.pair_weights.push_back(weight(rng));
    }
    codec.keys = std::make_shared<const KeyCodec>(std::move(heads));
  }

  /// Gives every token a place of its own in twice as many pages as needed; every ninth has none.
  void scatter(Rng& rng) {
    const Index num_pages = 2 * ((num_tokens + shape.page_size - 1) / shape.page_size);
    std::vector<std::int64_t> places(static_cast<std::size_t>(num_pages * shape.page_size));
    std::iota(places.begin(), places.end(), 0);
    std::shuffle(places.begin(), places.end(), rng);
    slot_mapping.assign(places.begin(), places.begin() + num_tokens);
    for (std::size_t i = 4; i < slot_mapping.size(); i += 9) slot_mapping[i] = -1;
    noise.resize(static_cast<std::size_t>(num_pages * layout.page_bytes));
    for (std::uint8_t& byte : noise) byte = static_cast<std::uint8_t>(rng());
  }

  /// Integers of every token whose squares add up to `sum`.
  std::vector<float> integers_of_norm(Rng& rng, int sum) const {
    std::vector<float> result;
    std::vector<int> numbers(static_cast<std::size_t>(num_channels()));
    for (Index t = 0; t < num_tokens; ++t) {
      int rest = sum;
      std::fill(numbers.begin(), numbers.end(), 0);
      while (rest > 0) {
        int& number = numbers[rng() % numbers.size()];
        if (number < 4 && 2 * number + 1 <= rest) {
          rest -= 2 * number + 1;
          ++number;
        } else if (number > 0) {
          --number;
          rest += 2 * number + 1;
        }
      }
      for (const int number : numbers)
        result.push_back(static_cast<float>(rng() % 2 == 0 ? number : -number));
    }
    return result;
  }

  std::uint8_t* page_of(std::vector<std::uint8_t>& pages, Index token) const {
    return pages.data() +
           slot_mapping[static_cast<std::size_t>(token)] / shape.page_size * layout.page_bytes;
  }
  int slot_of(Index token) const {
    return static_cast<int>(slot_mapping[static_cast<std::size_t>(token)] % shape.page_size);
  }

  CodedToken token_in(std::vector<std::uint8_t>& pages, Index token) const {
    CodedToken coded;
    coded.key_codes.resize(
        static_cast<std::size_t>(shape.num_kv_heads * layout.num_groups * layout.num_books));
    coded.value_code.resize(static_cast<std::size_t>(layout.num_code_bits / 8));
    coded.key_norms.resize(static_cast<std::size_t>(layout.norms_per_token));
    coded.value_scales.resize(static_cast<std::size_t>(layout.value_blocks));
    cuda::get_token(layout, page_of(pages, token), slot_of(token), coded.key_codes.data(),
                    coded.key_norms.data(), coded.value_code.data(), coded.value_scales.data());
    return coded;
  }

  /// Judges `pages` after a call on `noise`. Returns what is wrong, or nothing. `logit_tolerance`
  /// bounds by how much a chosen logit may be below the largest one.
  std::string judge(std::vector<std::uint8_t> pages, double logit_tolerance) const {
    std::ostringstream wrong;
    std::vector<std::uint8_t> expected = noise;
    Index key_mismatches = 0, value_mismatches = 0, num_messages = 0, num_coded = 0;
    std::vector<std::uint16_t> host_codes(
        static_cast<std::size_t>(shape.num_kv_heads * layout.num_groups * layout.num_books));
    double host_errors = 0, errors = 0, value_errors = 0, host_value_errors = 0;
    Index polish_mismatches = 0;
    const auto complain = [&](Index token, const auto&... parts) {
      if (++num_messages > 8) return;
      wrong << "token " << token << " at place " << slot_mapping[static_cast<std::size_t>(token)]
            << ": ";
      (wrong << ... << parts) << "\n";
    };
    for (Index t = 0; t < num_tokens; ++t) {
      if (slot_mapping[static_cast<std::size_t>(t)] < 0) continue;
      const CodedToken coded = token_in(pages, t);
      cuda::put_token(layout, page_of(expected, t), slot_of(t), coded.key_codes.data(),
                      coded.key_norms.data(), coded.value_code.data(), coded.value_scales.data());
      if (!is_finite(key(t)) || !is_finite(value(t))) continue;
      ++num_coded;
      std::vector<std::uint16_t> norms(coded.key_norms.size());
      codec.keys->encode({key(t), 1, num_channels()},
                         {host_codes.data(), 1, static_cast<Index>(host_codes.size())},
                         norms.data());
      for (std::size_t n = 0; n < norms.size(); ++n)
        if (norms[n] != coded.key_norms[n])
          complain(t, "key norm ", n, " is ", from_bf16(coded.key_norms[n]), ", the host's ",
                   from_bf16(norms[n]));
      if (host_codes != coded.key_codes) {
        ++key_mismatches;
        const auto at =
            std::mismatch(host_codes.begin(), host_codes.end(), coded.key_codes.begin());
        const auto index = at.first - host_codes.begin();
        const int per_head = layout.num_groups * layout.num_books;
        if (is_exact)
          complain(t, "key codes differ first in head ", index / per_head, ", group ",
                   index % per_head / layout.num_books, ", stage ", index % layout.num_books / 2,
                   ", book ", index % 2, ": ", *at.second, ", the host's ", *at.first);
        else if (shape.beam_width == 1)
          judge_greedy(t, norms, coded.key_codes, complain);
      }
      errors += key_error(t, norms, coded.key_codes);
      host_errors += key_error(t, norms, host_codes);
      value_mismatches += judge_value(t, coded, logit_tolerance, complain);
      if (shape.polish_sweeps > 0) {
        std::vector<std::uint8_t> host_code(coded.value_code.size());
        std::vector<std::uint16_t> host_scales(coded.value_scales.size());
        codec.values->encode({value(t), 1, num_channels()},
                             {host_code.data(), 1, static_cast<Index>(host_code.size())},
                             host_scales.data());
        polish_mismatches += host_code != coded.value_code;
        value_errors += value_error(t, coded.value_code.data(), coded.value_scales.data());
        host_value_errors += value_error(t, host_code.data(), host_scales.data());
      }
    }
    if (expected != pages) {
      const auto at = std::mismatch(pages.begin(), pages.end(), expected.begin());
      const auto byte = at.first - pages.begin();
      wrong << "bits that belong to no token of the call have changed, first in page "
            << byte / layout.page_bytes << ", byte " << byte % layout.page_bytes << "\n";
    }
    // A tie within rounding sends a search another way once in many thousand stages.
    if (key_mismatches > num_coded / 50 + 1)
      wrong << key_mismatches << " of " << num_coded << " tokens have other key codes\n";
    if (std::abs(errors - host_errors) > 1e-3 * host_errors)
      wrong << "key errors add up to " << errors << ", the host's to " << host_errors << "\n";
    // Where the network's code or a flip is a tie within rounding, polish ends elsewhere.
    if (polish_mismatches > num_coded / 5 + 1)
      wrong << polish_mismatches << " of " << num_coded << " polished codes differ\n";
    if (std::abs(value_errors - host_value_errors) > 0.01 * host_value_errors)
      wrong << "value errors add up to " << value_errors << ", the host's to " << host_value_errors
            << "\n";
    const auto groups = static_cast<double>(num_coded * layout.num_code_bits / 2);
    if (static_cast<double>(value_mismatches) > 2 * logit_tolerance * groups + 1)
      wrong << value_mismatches << " of " << groups << " value patterns differ\n";
    return wrong.str();
  }

 private:
  bool is_finite(const float* numbers) const {
    return std::all_of(numbers, numbers + num_channels(), [](float x) { return std::isfinite(x); });
  }

  /// Numbers of one head's group of a unit key: real, then imaginary parts.
  std::vector<double> unit_group(Index token, const std::vector<std::uint16_t>& norms, int head,
                                 int group) const {
    const KeyCodecConfig& config = codec.keys->config();
    const int g = config.group_pairs;
    const std::uint16_t norm = norms[norms.size() > 1 ? static_cast<std::size_t>(head) : 0];
    const double factor = from_bf16(norm) > 0 ? 1 / double{from_bf16(norm)} : 0;
    std::vector<double> numbers;
    for (int part = 0; part < 2; ++part)
      for (int pair = group * g; pair < (group + 1) * g; ++pair) {
        const int channel =
            part == 0 ? config.pairs.real_channel(pair) : config.pairs.imag_channel(pair);
        numbers.push_back(static_cast<float>(key(token)[head * shape.head_dim + channel] * factor) *
                          double{weight_of(head, pair)});
      }
    return numbers;
  }

  float weight_of(int head, int pair) const {
    const std::vector<float>& weights = codec.keys->codebook(head).pair_weights;
    return weights.empty() ? 1.0f : weights[static_cast<std::size_t>(pair)];
  }

  /// The codebook as errors see it: rows times weights.
  KeyCodebook<float> weighted_codebook(int head) const {
    KeyCodebook<float> codebook = codec.keys->codebook(head);
    if (shape.weighted) codebook.rows = codebook.scaled_rows(codebook.pair_weights);
    return codebook;
  }

  double key_error(Index token, const std::vector<std::uint16_t>& norms,
                   const std::vector<std::uint16_t>& codes) const {
    double error = 0;
    const std::uint16_t* code = codes.data();
    for (int head = 0; head < shape.num_kv_heads; ++head) {
      const KeyCodebook<float> codebook = weighted_codebook(head);
      for (int group = 0; group < layout.num_groups; ++group) {
        std::vector<double> left = unit_group(token, norms, head, group);
        for (int b = 0; b < layout.num_books; ++b, ++code)
          for (std::size_t i = 0; i < left.size(); ++i)
            left[i] -= codebook.book(
                group, b / 2,
                b % 2)[*code * static_cast<Index>(left.size()) + static_cast<Index>(i)];
        for (const double x : left) error += x * x;
      }
    }
    return error;
  }

  /// Every stage's choice must be the best one within rounding.
  template <class Complain>
  void judge_greedy(Index token, const std::vector<std::uint16_t>& norms,
                    const std::vector<std::uint16_t>& codes, Complain complain) const {
    const int size = layout.codebook_size;
    const std::uint16_t* code = codes.data();
    for (int head = 0; head < shape.num_kv_heads; ++head) {
      const KeyCodebook<float> codebook = weighted_codebook(head);
      for (int group = 0; group < layout.num_groups; ++group) {
        std::vector<double> left = unit_group(token, norms, head, group);
        const auto width = static_cast<int>(left.size());
        for (int stage = 0; stage < layout.num_books / 2; ++stage, code += 2) {
          const float* const a_book = codebook.book(group, stage, 0);
          const float* const b_book = codebook.book(group, stage, 1);
          const auto error = [&](int a, int b) {
            double sum = 0;
            for (int i = 0; i < width; ++i)
              sum += std::pow(
                  left[static_cast<std::size_t>(i)] - a_book[a * width + i] - b_book[b * width + i],
                  2);
            return sum;
          };
          double least = error(0, 0);
          for (int a = 0; a < size; ++a)
            for (int b = 0; b < size; ++b) least = std::min(least, error(a, b));
          const double chosen = error(code[0], code[1]);
          double length = 0;
          for (const double x : left) length += x * x;
          if (!(chosen - least <= 1e-5 * (length + least)))
            complain(token, "head ", head, ", group ", group, ", stage ", stage, ": codes (",
                     code[0], ", ", code[1], ") leave ", chosen, ", the best ", least);
          for (int i = 0; i < width; ++i)
            left[static_cast<std::size_t>(i)] -=
                double{a_book[code[0] * width + i]} + b_book[code[1] * width + i];
        }
      }
    }
  }

  /// A polished code is judged by its error beside that of the host's code.
  double value_error(Index token, const std::uint8_t* code, const std::uint16_t* scales) const {
    std::vector<float> decoded(static_cast<std::size_t>(num_channels()));
    codec.values->decode({code, 1, layout.num_code_bits / 8}, scales,
                         {decoded.data(), 1, num_channels()});
    double error = 0;
    for (int c = 0; c < num_channels(); ++c)
      error += std::pow(double{value(token)[c]} - decoded[static_cast<std::size_t>(c)], 2);
    return error;
  }

  /// A block of a token's values divided by the channel scales, as the host divides them.
  std::vector<double> value_block(Index token, int block) const {
    const int C = codec.values->config().block().num_channels;
    const std::vector<float>& scales = codec.values->weights().channel_scales;
    std::vector<double> numbers;
    for (int c = block * C; c < (block + 1) * C; ++c)
      numbers.push_back(scales.empty() ? value(token)[c]
                                       : value(token)[c] / scales[static_cast<std::size_t>(c)]);
    return numbers;
  }

  static double length_of(const std::vector<double>& numbers) {
    double squares = 0;
    for (const double x : numbers) squares += x * x;
    return std::sqrt(squares);
  }

  /// The network's logits of a block in double.
  std::vector<double> logits_of(std::vector<double> x, int block) const {
    const ValueCodecConfig config = codec.values->config().block();
    const ValueCodecWeights& weights = codec.values->weights();
    const auto C = static_cast<std::size_t>(config.num_channels);
    const double norm = length_of(x);
    double mean = 0, variance = 0;
    for (double& number : x) number /= norm;
    for (const double number : x) mean += number / static_cast<double>(C);
    for (const double number : x) variance += std::pow(number - mean, 2) / static_cast<double>(C);
    const std::size_t first = static_cast<std::size_t>(block) * C;
    for (std::size_t c = 0; c < C; ++c)
      x[c] = (x[c] - mean) / std::sqrt(variance + kValueLayerNormEpsilon) *
                 weights.norm_gain[first + c] +
             weights.norm_bias[first + c];
    const auto layer = [&](const std::vector<float>& weight, const std::vector<float>& bias,
                           const std::vector<double>& in, int outputs) {
      std::vector<double> sums;
      for (int o = 0; o < outputs; ++o) {
        const auto output = static_cast<std::size_t>(block * outputs + o);
        double sum = bias[output];
        for (std::size_t i = 0; i < in.size(); ++i) sum += in[i] * weight[output * in.size() + i];
        sums.push_back(sum);
      }
      return sums;
    };
    std::vector<double> hidden =
        layer(weights.hidden_weight, weights.hidden_bias, x, config.hidden_size);
    for (double& h : hidden) h *= std::erfc(-h * std::sqrt(0.5)) / 2;
    return layer(weights.output_weight, weights.output_bias, hidden, config.num_logits());
  }

  /// Returns in how many groups the pattern is not that of the largest logit in double; of codes
  /// that are not polished. Judges the scales.
  template <class Complain>
  Index judge_value(Index token, const CodedToken& coded, double tolerance,
                    Complain complain) const {
    const ValueCodecConfig config = codec.values->config().block();
    const int C = config.num_channels, num_bits = config.num_code_bits();
    const std::vector<float>& scales = codec.values->weights().channel_scales;
    Index mismatches = 0;
    for (int block = 0; block < shape.value_blocks; ++block) {
      const std::vector<double> numbers = value_block(token, block);
      const double norm = length_of(numbers);
      const auto bit = [&](int i) {
        return get_bits(coded.value_code.data(), Index{block} * num_bits + i, 1);
      };
      std::vector<double> logits;
      if (norm > 0 && config.polish_sweeps == 0) logits = logits_of(numbers, block);
      for (std::size_t first = 0; first < logits.size(); first += 4) {
        const double* const four = logits.data() + first;
        const auto best = std::max_element(four, four + 4) - four;
        const int i = static_cast<int>(first) / 2;
        const auto pattern = std::find(std::begin(kValuePatterns), std::end(kValuePatterns),
                                       bit(i) | bit(i + 1) << 1) -
                             kValuePatterns;
        if (pattern == best) continue;
        ++mismatches;
        if (!(four[best] - four[pattern] <= tolerance))
          complain(token, "value block ", block, ", group ", i / 2, " has pattern ", pattern,
                   " with logit ", four[pattern], "; the largest is ", best, " with ", four[best]);
      }
      std::vector<double> sums(static_cast<std::size_t>(C));
      for (int i = 0; i < num_bits; ++i)
        for (int c = 0; c < C && bit(i) != 0; ++c) {
          const float row = codec.values->decoder()(Index{block} * num_bits + i, c);
          sums[static_cast<std::size_t>(c)] +=
              scales.empty() ? row : row / scales[static_cast<std::size_t>(block * C + c)];
        }
      judge_scale(token, block, norm, length_of(sums),
                  coded.value_scales[static_cast<std::size_t>(block)], complain);
    }
    return mismatches;
  }

  template <class Complain>
  void judge_scale(Index token, int block, double norm, double length, std::uint16_t written_bits,
                   Complain complain) const {
    const double scale = length > 0 ? norm / length : 0;
    const double written = from_bf16(written_bits);
    const double allowed = is_exact ? 0 : 1e-3;  // of half a bf16 step
    if (!(std::abs(written - scale) <= (1 + allowed) * std::ldexp(scale, -8)) ||
        (is_exact && shape.value_blocks == 1 && !shape.scaled_values &&
         written_bits != to_bf16(static_cast<float>(scale))))
      complain(token, "value scale ", block, " is ", written, "; it should be ", scale);
  }
};

}  // namespace commvq::testing_support
