#include "commvq/cuda/page_layout.hpp"

#include <algorithm>

#include "commvq/core/bit_packing.hpp"
#include "commvq/core/error.hpp"
#include "commvq/cuda/integer_codebook.hpp"
#include "commvq/value_codec/value_codec.hpp"

#include "core/divide_up.hpp"

namespace commvq::cuda {
namespace {

/// Larger pages' bit offsets would not fit an int.
constexpr Index kMaxPageBits = Index{60} << 23;

int align(Index bytes) {
  return static_cast<int>((bytes + 15) / 16 * 16);
}

/// Reads or writes the bits of a token's codes in one plane: the first of them in words, the rest
/// in the tail. `access(bit position in the page, code, width)` handles one piece.
template <class Access>
void for_each_piece(const DevicePageLayout& layout, const KeyPlane& plane, int head, int slot,
                    Access access) {
  const Index words = Index{8} * layout.key_words(plane, head, slot);
  const Index tail = layout.key_tail_bit(plane, head, slot);
  const int word_bits = plane.num_words * 32;
  for (int k = 0; k < plane.num_books; ++k) {
    const int first = k * layout.code_bits;
    const int in_words = std::clamp(word_bits - first, 0, layout.code_bits);
    if (in_words > 0) access(words + first, k, 0, in_words);
    if (in_words < layout.code_bits)
      access(tail + first + in_words - word_bits, k, in_words, layout.code_bits - in_words);
  }
}

/// Without places in a page.
KeyPlane whole_plane(int group, int first_book, int num_books) {
  KeyPlane plane{};
  plane.group = group;
  plane.first_book = first_book;
  plane.num_books = num_books;
  plane.stage_step = plane.last_step = 1;
  return plane;
}
/// The i-th of the four planes of some books.
KeyPlane fourth_plane(int group, int first_book, int num_books, int i) {
  const int stages = num_books / 2, most = divide_up(stages, 4), missing = 4 * most - stages;
  KeyPlane plane{};
  plane.group = group;
  plane.num_books = 2 * (i < missing ? most - 1 : most);
  // With one stage in all, it belongs to the last plane.
  plane.first_book = first_book + 2 * (most == 1 ? i - missing : i);
  plane.stage_step = 4;
  plane.last_step = i < missing ? 4 : 4 - missing;
  return plane;
}

}  // namespace

Index key_plane_bytes(int compute_capability) {
  // Of 227, 163 and 99 KiB a block, less what the kernel keeps beside the rows.
  if (compute_capability >= 90 && compute_capability < 120) return 176 * 1024;
  if (compute_capability == 80 || compute_capability == 87) return 112 * 1024;
  return 56 * 1024;
}

DevicePageLayout::DevicePageLayout(const KeyCodecConfig& keys, int num_kv_heads_,
                                   const ValueCodecConfig& values, int page_size_,
                                   Index plane_bytes_)
    : page_size(page_size_),
      num_kv_heads(num_kv_heads_),
      head_dim(keys.pairs.head_dim),
      codebook_size(keys.codebook_size),
      code_bits(keys.code_bits()),
      num_groups(keys.num_groups()),
      num_books(2 * keys.num_stages),
      num_code_bits(values.num_code_bits()),
      value_blocks(values.num_blocks),
      norms_per_token(keys.num_norms(num_kv_heads)),
      plane_bytes(plane_bytes_) {
  require(page_size == 16 || page_size == 32 || page_size == 64 || page_size == 128,
          "page_size is ", page_size, "; the device supports 16, 32, 64 and 128");
  require(head_dim == 64 || head_dim == 128 || head_dim == 256, "head_dim is ", head_dim,
          "; the device supports 64, 128 and 256");
  require(values.num_channels == num_kv_heads * head_dim, "the value codec has ",
          values.num_channels, " channels; the keys have ", num_kv_heads, " heads of ", head_dim);
  const int width = slice_width(keys);
  int step = width == 32 ? 2 : 1;  // books that share a line
  const Index bytes_per_step = IntegerKeySlice::image_bytes(width, 8, step, codebook_size);
  require(bytes_per_step <= plane_bytes, "codebook_size is ", codebook_size,
          "; one book of the device's integers takes ", bytes_per_step,
          " bytes of shared memory, of which ", plane_bytes, " are there");
  int most = static_cast<int>(std::min<Index>(plane_bytes / bytes_per_step, num_books)) * step;
  if (width == 64 && codebook_size == 64 && plane_bytes >= kMostNarrowBooks / 2 * bytes_per_step) {
    key_row_bits = 4;
    planes_at_once = 4;
    step = 2;
    most = kMostNarrowBooks;
  }
  const int turns = divide_up(num_books, most);  // of kernels, for one group
  num_planes = num_groups * turns * planes_at_once;
  require(num_planes <= kMaxPlanes, "the key codec needs ", num_planes,
          " planes of codes on the device (", num_groups, " groups of ", num_books, " books of ",
          codebook_size, " centroids); at most ", kMaxPlanes, " are supported");
  const Index bits = Index{keys.bits_per_head()} * num_kv_heads + num_code_bits;
  require(
      bits * page_size <= kMaxPageBits, "a page of ", page_size, " tokens of ", bits,
      " bits each is larger than the 60 MiB that the device's offsets reach; use smaller pages");
  for (int turn = 0, first_book = 0; turn < num_groups * turns; ++turn) {
    if (turn % turns == 0) first_book = 0;
    // As even as the step allows.
    const int left = num_books - first_book, turns_left = turns - turn % turns;
    const int books = std::min(left, divide_up(divide_up(left, turns_left), step) * step);
    for (int i = 0; i < planes_at_once; ++i)
      planes[turn * planes_at_once + i] = planes_at_once == 1
                                              ? whole_plane(turn / turns, first_book, books)
                                              : fourth_plane(turn / turns, first_book, books, i);
    first_book += books;
  }
  int at = 0;
  for (int i = 0; i < num_planes; ++i) {
    KeyPlane& plane = planes[i];
    const int bits_of_token = plane.num_books * code_bits;
    plane.num_words = KeyPlane::whole_words(bits_of_token);
    plane.tail_bits = bits_of_token - plane.num_words * 32;
    plane.words_offset = at;
    at = align(at + Index{num_kv_heads} * page_size * plane.num_words * 4);
  }
  value_codes_offset = at;
  at = align(at + Index{page_size} / 16 * num_code_bits * 2);
  for (int i = 0; i < num_planes; ++i) {
    planes[i].tails_offset = at;
    at = align(at + bytes_for(Index{num_kv_heads} * page_size * planes[i].tail_bits));
  }
  key_norms_offset = at;
  at = align(at + Index{norms_per_token} * page_size * 2);
  require(
      value_blocks == 1 || is_binary(), "the value codec has num_blocks ", value_blocks,
      "; with these key codes the device supports 1, and a block a head with those of speed_1bit ",
      "and speed_2bit at head_dim 128");
  require(!is_binary() || keys.graded == values.graded, "graded is ",
          keys.graded ? "true" : "false", " for the keys and ", values.graded ? "true" : "false",
          " for the values; the device supports binary codes that are graded on both sides or on ",
          "neither, as calibrate --method speed learns them");
  graded = is_binary() && keys.graded;
  value_scales_offset = at;
  page_bytes = align(at + Index{value_blocks} * page_size * 2);
}

void put_token(const DevicePageLayout& layout, std::uint8_t* page, int slot,
               const std::uint16_t* key_codes, const std::uint16_t* key_norms,
               const std::uint8_t* value_code, const std::uint16_t* value_scales) {
  for (int head = 0; head < layout.num_kv_heads; ++head)
    for (int p = 0; p < layout.num_planes; ++p) {
      const KeyPlane& plane = layout.planes[p];
      const std::uint16_t* const codes =
          key_codes + (head * layout.num_groups + plane.group) * layout.num_books;
      for_each_piece(layout, plane, head, slot, [&](Index bit, int k, int shift, int width) {
        put_bits(page, bit, width, static_cast<std::uint32_t>(codes[plane.book(k)]) >> shift);
      });
    }
  for (int i = 0; i < layout.norms_per_token; ++i)
    put_bits(page, Index{8} * layout.key_norm(i, slot), 16, key_norms[i]);
  for (int bit = 0; bit < layout.num_code_bits; ++bit)
    put_bits(page, layout.value_bit(bit, slot), 1, get_bits(value_code, bit, 1));
  for (int i = 0; i < layout.value_blocks; ++i)
    put_bits(page, Index{8} * layout.value_scale(i, slot), 16, value_scales[i]);
}

void get_token(const DevicePageLayout& layout, const std::uint8_t* page, int slot,
               std::uint16_t* key_codes, std::uint16_t* key_norms, std::uint8_t* value_code,
               std::uint16_t* value_scales) {
  for (int head = 0; head < layout.num_kv_heads; ++head)
    for (int p = 0; p < layout.num_planes; ++p) {
      const KeyPlane& plane = layout.planes[p];
      std::uint16_t* const codes =
          key_codes + (head * layout.num_groups + plane.group) * layout.num_books;
      for_each_piece(layout, plane, head, slot, [&](Index bit, int k, int shift, int width) {
        std::uint16_t& code = codes[plane.book(k)];
        if (shift == 0) code = 0;
        code |= static_cast<std::uint16_t>(get_bits(page, bit, width) << shift);
      });
    }
  for (int i = 0; i < layout.norms_per_token; ++i)
    key_norms[i] =
        static_cast<std::uint16_t>(get_bits(page, Index{8} * layout.key_norm(i, slot), 16));
  for (int bit = 0; bit < layout.num_code_bits; ++bit)
    put_bits(value_code, bit, 1, get_bits(page, layout.value_bit(bit, slot), 1));
  for (int i = 0; i < layout.value_blocks; ++i)
    value_scales[i] =
        static_cast<std::uint16_t>(get_bits(page, Index{8} * layout.value_scale(i, slot), 16));
}

}  // namespace commvq::cuda
