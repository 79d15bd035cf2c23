#pragma once

#include <cstdint>

#include "commvq/core/export.h"
#include "commvq/core/host_device.hpp"
#include "commvq/core/view.hpp"
#include "commvq/key_codec/config.hpp"

namespace commvq {
struct ValueCodecConfig;
}

namespace commvq::cuda {

/// Codes of some books of one group that a thread reads together, as one little-endian bit string a
/// token. A book is a half stage: book 2r is A_r, 2r + 1 is B_r.
///
/// With rows of 8 bits these are consecutive books whose rows fit a kernel's shared memory
/// together. With rows of 4 bits the stages that do are shared out among four planes, one by one;
/// if they are no multiple of four, the first planes lack one of the last four.
struct KeyPlane {
  int group;       ///< of pairs
  int first_book;  ///< of the group's 2 * num_stages
  int num_books;
  int stage_step;    ///< from one stage to the next: 1 or 4 ...
  int last_step;     ///< ... but to the last one
  int num_words;     ///< whole 32-bit words that a token's codes fill ...
  int tail_bits;     ///< ... and the bits that are left, at most 32; 0 without books
  int words_offset;  ///< bytes from the page's start to the words of head 0
  int tails_offset;  ///< likewise of the tails

  /// Whole words of a token's codes of so many bits, of which at least one is left for the tail.
  static constexpr int whole_words(int bits) { return (bits - 1) / 32; }

  /// The group's book whose code is the k-th.
  COMMVQ_HOST_DEVICE int book(int k) const {
    const int stage = k / 2, last = num_books / 2 - 1;
    const int steps =
        stage * stage_step + (stage == last && stage > 0 ? last_step - stage_step : 0);
    return first_book + 2 * steps + k % 2;
  }
};

/// How the codes of `page_size` tokens of one layer lie in a page in device memory.
///
///     key words     per plane [num_kv_heads][page_size][num_words] 32-bit words
///     value codes   [page_size / 16][num_code_bits] 16-bit words; bit j is token j of the 16
///       or, graded, [page_size / 16][num_code_bits / 16][16 tokens]; the first code bit is highest
///     key tails     per plane [num_kv_heads] bit streams [page_size][tail_bits]
///     key norms     [norms_per_token][page_size] bf16
///     value scales  [value_blocks][page_size] bf16
///
/// A token's codes of a plane are one little-endian bit string, code k at bits
/// [k * code_bits, (k + 1) * code_bits): the first num_words * 32 bits are its words, the rest its
/// tail. So every code has a bit position that does not depend on the token, no bit is wasted, and
/// the sections begin on 16 bytes. The bits are the same as in the host's `PageLayout`, in another
/// order.
struct COMMVQ_API DevicePageLayout {
  static constexpr int kMaxPlanes = 32;
  static constexpr int kMostNarrowBooks = 44;  ///< whose rows of 4 bits a kernel adds up

  int page_size = 64;  ///< tokens: 16, 32, 64 or 128
  int num_kv_heads = 0;
  int head_dim = 0;
  int codebook_size = 0;
  int code_bits = 0;  ///< of one key code
  int num_groups = 0;
  int num_books = 0;        ///< of one group: 2 * num_stages
  int num_code_bits = 0;    ///< of one token's values
  int value_blocks = 1;     ///< of the value codec: each has its own bits, in order, and scale
  bool graded = false;      ///< binary codes, and bits of keys and values are numbers
  int norms_per_token = 1;  ///< 1: over all heads; num_kv_heads: one a head
  Index plane_bytes = 0;    ///< shared memory that the 8-bit rows of one plane may take
  /// Bits of the entries of key rows: 4 for books of 64 centroids over groups of more than 32
  /// pairs, as in the presets at head_dim 128, where half of kMostNarrowBooks in 8 bits fit
  /// `plane_bytes`; else 8.
  int key_row_bits = 8;
  int planes_at_once = 1;  ///< that one kernel adds up: 4 with rows of 4 bits
  int num_planes = 0;
  KeyPlane planes[kMaxPlanes] = {};
  int value_codes_offset = 0;  ///< bytes
  int key_norms_offset = 0;
  int value_scales_offset = 0;
  int page_bytes = 0;  ///< a multiple of 16, at most 64 MiB

  DevicePageLayout() = default;
  /// For `plane_bytes` see `key_plane_bytes`. Throws `Error` for shapes that the kernels do not
  /// support, naming the limit.
  DevicePageLayout(const KeyCodecConfig& keys, int num_kv_heads, const ValueCodecConfig& values,
                   int page_size, Index plane_bytes);

  /// True for key codes of 120 or 248 books of two rows over whole heads of 128 channels, and
  /// values with a block a head of 8 bits more: binary codes, which a kernel of their own reads
  /// without looking anything up.
  bool is_binary() const {
    return codebook_size == 2 && num_groups == 1 && num_planes == 1 && head_dim == 128 &&
           value_blocks == num_kv_heads && (num_books == 120 || num_books == 248) &&
           num_code_bits == value_blocks * (num_books + 8);
  }

  /// Bytes of a page over its tokens: codes, norms and scales, all heads, and up to 15 bytes a
  /// section of alignment.
  double bytes_per_token() const { return static_cast<double>(page_bytes) / page_size; }

  /// Bytes from the page's start to the words of a token, `planes[plane].num_words` of them.
  COMMVQ_HOST_DEVICE int key_words(const KeyPlane& plane, int head, int slot) const {
    return plane.words_offset + (head * page_size + slot) * plane.num_words * 4;
  }
  /// Bits from the page's start to the tail of a token.
  COMMVQ_HOST_DEVICE int key_tail_bit(const KeyPlane& plane, int head, int slot) const {
    return plane.tails_offset * 8 + (head * page_size + slot) * plane.tail_bits;
  }
  /// Sums over tokens that the decoder of the values is multiplied with: of bits, or numbers.
  int num_value_sums() const { return graded ? num_code_bits / 2 : num_code_bits; }

  /// Bytes from the page's start to the 16-bit words of 16 tokens, of which `slot` is one.
  COMMVQ_HOST_DEVICE int value_codes(int slot) const {
    return value_codes_offset + slot / 16 * num_code_bits * 2;
  }
  /// Bits from the page's start to bit `bit` of a token's value code.
  COMMVQ_HOST_DEVICE Index value_bit(int bit, int slot) const {
    const Index first = Index{8} * value_codes(slot);
    if (graded) return first + 16 * (bit / 16 * 16 + slot % 16) + 15 - bit % 16;
    return first + 16 * bit + slot % 16;
  }
  COMMVQ_HOST_DEVICE int key_norm(int head, int slot) const {
    return key_norms_offset + 2 * ((norms_per_token == 1 ? 0 : head) * page_size + slot);
  }
  COMMVQ_HOST_DEVICE int value_scale(int block, int slot) const {
    return value_scales_offset + 2 * (block * page_size + slot);
  }
};

/// Shared memory that one plane's rows may take on a device of this compute capability
/// (major * 10 + minor, e.g. 90). The layout of pages depends on it.
COMMVQ_API Index key_plane_bytes(int compute_capability);

/// Writes token `slot` of a page in host memory: what `append` writes on the device.
/// `key_codes` is `[num_kv_heads][num_groups][num_stages][2]`, `key_norms` `[norms_per_token]`
/// bf16, `value_code` the packed bits as `ValueCodec::encode` writes them, `value_scales`
/// `[value_blocks]` bf16.
COMMVQ_API void put_token(const DevicePageLayout& layout, std::uint8_t* page, int slot,
                          const std::uint16_t* key_codes, const std::uint16_t* key_norms,
                          const std::uint8_t* value_code, const std::uint16_t* value_scales);
/// The inverse.
COMMVQ_API void get_token(const DevicePageLayout& layout, const std::uint8_t* page, int slot,
                          std::uint16_t* key_codes, std::uint16_t* key_norms,
                          std::uint8_t* value_code, std::uint16_t* value_scales);

}  // namespace commvq::cuda
