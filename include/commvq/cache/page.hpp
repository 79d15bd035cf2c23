#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "commvq/core/export.h"
#include "commvq/core/float16.hpp"
#include "commvq/core/view.hpp"
#include "commvq/io/codebook_file.hpp"

namespace commvq {

/// Memory of one page, `PageLayout::page_bytes()`.
using Page = std::vector<std::uint8_t>;
using PagePtr = std::shared_ptr<Page>;

/// How the codes of `page_size` tokens lie in a page. All sections are exactly as large as
/// their contents:
///
///     key norms    [page_size][num_key_norms] bf16        or  exact keys   [page_size][channels]
///     value scales [page_size][num_value_scales] bf16     or  exact values [page_size][channels]
///     key codes    [num_kv_heads] bit streams [page_size][num_codes], as `put_bits` writes
///     value codes  [page_size / 8][num_code_bits] bytes; bit t % 8 is token t's
///
/// A byte of the value codes holds one code bit of eight tokens, because attention adds up
/// probabilities along tokens.
struct COMMVQ_API PageLayout {
  Index page_size = 64;
  FloatType exact_type = FloatType::kBf16;
  Index num_channels = 0;  ///< num_kv_heads * head_dim
  int num_kv_heads = 0;
  int key_codes = 0;        ///< codes of one token and head; 0 if keys are exact
  int key_code_bits = 0;    ///< bits of one code
  int num_key_norms = 0;    ///< norms of one token: 1, num_kv_heads, or 0 if keys are exact
  int value_code_bits = 0;  ///< code bits of one token; 0 if values are exact
  int num_value_scales = 0;  ///< scales of one token, one a block; 0 if values are exact

  /// Throws `Error` unless page_size is a positive multiple of 8.
  PageLayout(Index page_size, FloatType exact_type, int num_kv_heads, int head_dim,
             const LayerCodec& codec);

  bool keys_coded() const { return key_codes > 0; }
  bool values_coded() const { return value_code_bits > 0; }
  /// Code bits of one token in one block; 0 if values are exact.
  int block_code_bits() const { return values_coded() ? value_code_bits / num_value_scales : 0; }
  /// The block that holds a head's values.
  int value_block(int head) const { return head * num_value_scales / num_kv_heads; }

  Index bits_per_token() const;
  Index page_bytes() const { return page_size * bits_per_token() / 8; }

  /// Offsets in bytes.
  Index key_norm(Index token, int head) const {
    return 2 * (token * num_key_norms + (num_key_norms > 1 ? head : 0));
  }
  Index exact_keys(Index token) const { return token * num_channels * size_of(exact_type); }
  Index value_scale(Index token, int block) const {
    return values_begin() + 2 * (token * num_value_scales + block);
  }
  Index exact_values(Index token) const {
    return values_begin() + token * num_channels * size_of(exact_type);
  }
  Index key_stream(int head) const {
    return values_begin() + page_size * value_row_bytes() + head * key_stream_bytes();
  }
  Index key_stream_bytes() const { return page_size / 8 * key_codes * key_code_bits; }
  Index value_bits(Index token) const {
    return key_stream(num_kv_heads) + token / 8 * value_code_bits;
  }

  /// Writes token `token` of a page. `key_codes_row` is `[num_kv_heads * key_codes]`, `norms`
  /// `[num_key_norms]`, `value_code` the packed bits as `ValueCodec::encode` writes them, `scales`
  /// `[num_value_scales]`.
  void put_key(Page& page, Index token, const std::uint16_t* key_codes_row,
               const std::uint16_t* norms) const;
  void put_value(Page& page, Index token, const std::uint8_t* value_code,
                 const std::uint16_t* scales) const;
  /// The inverses.
  void get_key(const Page& page, Index token, std::uint16_t* key_codes_row,
               std::uint16_t* norms) const;
  void get_value(const Page& page, Index token, std::uint8_t* value_code,
                 std::uint16_t* scales) const;

 private:
  Index values_begin() const { return page_size * key_row_bytes(); }
  Index key_row_bytes() const {
    return keys_coded() ? 2 * num_key_norms : num_channels * size_of(exact_type);
  }
  Index value_row_bytes() const {
    return values_coded() ? 2 * num_value_scales : num_channels * size_of(exact_type);
  }
};

}  // namespace commvq
