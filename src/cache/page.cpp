#include "commvq/cache/page.hpp"

#include <cstring>

#include "commvq/core/bit_packing.hpp"

namespace commvq {

PageLayout::PageLayout(Index page_size_, FloatType exact_type_, int num_kv_heads_, int head_dim,
                       const LayerCodec& codec)
    : page_size(page_size_),
      exact_type(exact_type_),
      num_channels(Index{num_kv_heads_} * head_dim),
      num_kv_heads(num_kv_heads_) {
  require(page_size >= 8 && page_size % 8 == 0, "page_size is ", page_size,
          "; it must be a positive multiple of 8");
  if (codec.keys) {
    key_codes = codec.keys->config().num_codes();
    key_code_bits = codec.keys->config().code_bits();
    num_key_norms = codec.keys->config().num_norms(num_kv_heads);
  }
  if (codec.values) {
    value_code_bits = codec.values->config().num_code_bits();
    num_value_scales = codec.values->config().num_blocks;
  }
}

Index PageLayout::bits_per_token() const {
  const Index code_bits = Index{num_kv_heads} * key_codes * key_code_bits + value_code_bits;
  return 8 * (key_row_bytes() + value_row_bytes()) + code_bits;
}

void PageLayout::put_key(Page& page, Index token, const std::uint16_t* key_codes_row,
                         const std::uint16_t* norms) const {
  std::memcpy(page.data() + key_norm(token, 0), norms, static_cast<std::size_t>(key_row_bytes()));
  for (int head = 0; head < num_kv_heads; ++head) {
    std::uint8_t* const stream = page.data() + key_stream(head);
    Index position = token * key_codes * key_code_bits;
    for (int i = 0; i < key_codes; ++i, position += key_code_bits)
      put_bits(stream, position, key_code_bits, *key_codes_row++);
  }
}

void PageLayout::get_key(const Page& page, Index token, std::uint16_t* key_codes_row,
                         std::uint16_t* norms) const {
  std::memcpy(norms, page.data() + key_norm(token, 0), static_cast<std::size_t>(key_row_bytes()));
  for (int head = 0; head < num_kv_heads; ++head) {
    const std::uint8_t* const stream = page.data() + key_stream(head);
    Index position = token * key_codes * key_code_bits;
    for (int i = 0; i < key_codes; ++i, position += key_code_bits)
      *key_codes_row++ = static_cast<std::uint16_t>(get_bits(stream, position, key_code_bits));
  }
}

void PageLayout::put_value(Page& page, Index token, const std::uint8_t* value_code,
                           const std::uint16_t* scales) const {
  std::memcpy(page.data() + value_scale(token, 0), scales,
              static_cast<std::size_t>(value_row_bytes()));
  std::uint8_t* const bytes = page.data() + value_bits(token);
  const int shift = static_cast<int>(token % 8);
  for (int i = 0; i < value_code_bits; ++i) {
    const int bit = (value_code[i / 8] >> (i % 8)) & 1;
    bytes[i] = static_cast<std::uint8_t>((bytes[i] & ~(1 << shift)) | (bit << shift));
  }
}

void PageLayout::get_value(const Page& page, Index token, std::uint8_t* value_code,
                           std::uint16_t* scales) const {
  std::memcpy(scales, page.data() + value_scale(token, 0),
              static_cast<std::size_t>(value_row_bytes()));
  const std::uint8_t* const bytes = page.data() + value_bits(token);
  const int shift = static_cast<int>(token % 8);
  for (int i = 0; i < value_code_bits; i += 8) {
    int packed = 0;
    for (int bit = 0; bit < 8; ++bit) packed |= ((bytes[i + bit] >> shift) & 1) << bit;
    value_code[i / 8] = static_cast<std::uint8_t>(packed);
  }
}

}  // namespace commvq
