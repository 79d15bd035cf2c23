#include "commvq/key_codec/key_codec.hpp"

#include <cmath>
#include <utility>

#include "commvq/core/float16.hpp"

#include "core/hasher.hpp"

namespace commvq {
namespace {

/// The bf16 L2 norm of channels `[first, first + count)` of a key. Throws `Error` for what no bf16
/// can hold.
std::uint16_t rounded_norm(MatrixView<const float> keys, Index token, Index first, Index count) {
  double sum = 0;
  const float* const key = keys.row(token);
  for (Index i = first; i < first + count; ++i) {
    require(std::isfinite(key[i]), "key of token ", token, ", channel ", i, " is ", key[i],
            "; only finite keys can be coded");
    sum += static_cast<double>(key[i]) * key[i];
  }
  const double norm = std::sqrt(sum);
  const std::uint16_t bits = to_bf16(static_cast<float>(norm));
  require(std::isfinite(from_bf16(bits)), "key of token ", token, " has norm ", norm,
          "; the largest norm that bf16 holds is 3.3895e38");
  return bits;
}

/// Throws unless the rows of a graded codebook share their directions.
void check_graded(const KeyCodebook<float>& codebook, std::size_t head) {
  const KeyCodecConfig& config = codebook.config;
  for (int group = 0; group < config.num_groups(); ++group)
    for (int book = 0; book < 2 * config.num_stages; ++book) {
      const GradedBit bit = graded_bit(book);
      const int last = graded_last_bit(book);
      for (int i = 0; i < codebook.row_size(); ++i) {
        const float given = codebook.difference(group, book, i);
        const float needed = float(bit.weight) * codebook.difference(group, last, i);
        require(given == needed, "the codebook of head ", head, " is not graded: in group ", group,
                ", channel ", i, ", row 1 less row 0 is ", given, " in book ", book,
                "; it must be ", bit.weight, " times that of book ", last, ", ", needed);
      }
    }
}

Digest digest_of(const std::vector<KeyEncoder<float>>& heads) {
  const KeyCodecConfig& config = heads.front().codebook().config;
  detail::Hasher hasher;
  hasher.add("commvq.keys.1");
  for (const int number :
       {static_cast<int>(heads.size()), config.pairs.head_dim, config.pairs.rotary_dim,
        static_cast<int>(config.pairs.layout), config.group_pairs, config.codebook_size,
        config.num_stages, int{config.tied}, config.beam_width, int{config.norm_per_head},
        int{!heads.front().codebook().pair_weights.empty()}})
    hasher.add(Index{number});
  for (const KeyEncoder<float>& head : heads) {
    hasher.add(std::span<const float>(head.codebook().rows));
    hasher.add(std::span<const float>(head.codebook().pair_weights));
  }
  return hasher.digest();
}

}  // namespace

KeyCodec::KeyCodec(std::vector<KeyCodebook<float>> codebooks) {
  require(!codebooks.empty(), "a key codec needs a codebook for each KV head; none is given");
  for (std::size_t head = 0; head < codebooks.size(); ++head) {
    require(codebooks[head].config == codebooks[0].config, "the codebook of head ", head,
            " has another configuration than that of head 0; all heads of a layer share one");
    require(codebooks[head].pair_weights.empty() == codebooks[0].pair_weights.empty(),
            "the codebooks of heads 0 and ", head, " differ in having weights");
    for (std::size_t i = 0; i < codebooks[head].rows.size(); ++i)
      require(std::isfinite(codebooks[head].rows[i]), "number ", i, " of the codebook of head ",
              head, " is ", codebooks[head].rows[i], "; it must be finite");
  }
  heads_.reserve(codebooks.size());
  for (KeyCodebook<float>& codebook : codebooks) {
    heads_.emplace_back(std::move(codebook));
    if (config().graded) check_graded(heads_.back().codebook(), heads_.size() - 1);
  }
  digest_ = digest_of(heads_);
}

void KeyCodec::encode(MatrixView<const float> keys, MatrixView<std::uint16_t> codes,
                      std::uint16_t* norms) const {
  const Index head_dim = config().pairs.head_dim;
  const Index num_codes = config().num_codes();
  require(keys.cols == num_kv_heads() * head_dim, "the keys have ", keys.cols,
          " channels; the codec is for ", num_kv_heads(), " heads of ", head_dim);
  require(codes.rows == keys.rows && codes.cols == num_kv_heads() * num_codes, "codes are [",
          codes.rows, ", ", codes.cols, "]; these keys need [", keys.rows, ", ",
          num_kv_heads() * num_codes, "]");
  const Index norm_channels = keys.cols / num_norms();
  for (Index t = 0; t < keys.rows; ++t)
    for (Index i = 0; i < num_norms(); ++i)
      norms[t * num_norms() + i] = rounded_norm(keys, t, i * norm_channels, norm_channels);

  std::vector<float> planar(static_cast<std::size_t>(keys.rows * head_dim));
  std::vector<float> unit(static_cast<std::size_t>(head_dim));
  for (int head = 0; head < num_kv_heads(); ++head) {
    for (Index t = 0; t < keys.rows; ++t) {
      const double norm = from_bf16(norms[norm_index(t, head)]);
      const double factor = norm > 0 ? 1 / norm : 0;
      const float* const key = keys.row(t) + head * head_dim;
      for (Index i = 0; i < head_dim; ++i) unit[i] = static_cast<float>(key[i] * factor);
      config().pairs.to_planar(unit.data(), &planar[static_cast<std::size_t>(t * head_dim)]);
    }
    encoder(head).encode({planar.data(), keys.rows, head_dim}, config().beam_width,
                         codes.middle_cols(head * num_codes, num_codes));
  }
}

void KeyCodec::decode(MatrixView<const std::uint16_t> codes, const std::uint16_t* norms,
                      MatrixView<float> keys) const {
  const Index head_dim = config().pairs.head_dim;
  const Index num_codes = config().num_codes();
  require(codes.cols == num_kv_heads() * num_codes, "a row holds ", codes.cols,
          " codes; the codec has ", num_kv_heads() * num_codes);
  require(keys.rows == codes.rows && keys.cols == num_kv_heads() * head_dim, "the keys are [",
          keys.rows, ", ", keys.cols, "]; these codes decode to [", codes.rows, ", ",
          num_kv_heads() * head_dim, "]");
  for (Index t = 0; t < codes.rows; ++t)
    for (Index i = 0; i < codes.cols; ++i)
      require(codes(t, i) < config().codebook_size, "code ", i, " of token ", t, " is ",
              codes(t, i), "; the codebook has ", config().codebook_size, " centroids");

  std::vector<float> planar(static_cast<std::size_t>(head_dim));
  for (Index t = 0; t < codes.rows; ++t) {
    for (int head = 0; head < num_kv_heads(); ++head) {
      const float norm = from_bf16(norms[norm_index(t, head)]);
      decode_key(codebook(head), codes.row(t) + head * num_codes, planar.data());
      for (float& value : planar) value *= norm;
      config().pairs.from_planar(planar.data(), keys.row(t) + head * head_dim);
    }
  }
}

}  // namespace commvq
