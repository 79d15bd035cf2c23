#pragma once

#include <cstdint>

#include "common/memory.cuh"
#include "commvq/cuda/page_layout.hpp"

namespace commvq::cuda {

/// A compile-time book number.
template <int kBook>
struct Book {
  static constexpr int value = kBook;
  __device__ constexpr operator int() const { return kBook; }
};

/// The codes of one token and plane whose shape is known at compile time: a few registers, from
/// which every code is one shift and one mask.
template <int kCodeBits, int kNumBooks>
class FixedCodes {
 public:
  __device__ __forceinline__ void fetch(const DevicePageLayout& layout, const KeyPlane& plane,
                                        const std::uint8_t* page, int head, int slot) {
    const auto* const words =
        reinterpret_cast<const std::uint32_t*>(page + layout.key_words(plane, head, slot));
    if constexpr (kWords == 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(words);
      words_[0] = v.x, words_[1] = v.y, words_[2] = v.z, words_[3] = v.w;
    } else if constexpr (kWords == 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(words);
      words_[0] = v.x, words_[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words_[i] = words[i];
    }
    if constexpr (kTail > 0) {
      const int bit = layout.key_tail_bit(plane, head, slot);
      const auto* const tail = reinterpret_cast<const std::uint32_t*>(page) + bit / 32;
      // The next word belongs to the page as well: norms follow the tails.
      const std::uint32_t next = 32 % kTail == 0 ? 0 : tail[1];
      words_[kWords] = __funnelshift_r(tail[0], next, static_cast<std::uint32_t>(bit % 32));
    }
  }

  /// Sixteen bytes at `address` as `row_address` gives it.
  template <int kBook>
  __device__ __forceinline__ static uint4 load(Book<kBook>, std::uint32_t address) {
    return load_shared_16<kBook << (kCodeBits + 7)>(address);
  }
  /// Address of the code's row at 128 bytes a row, less the book's distance from the first one;
  /// `part` is the rows' address, which leaves the bits of a code free, and the place in the row.
  template <int kBook>
  __device__ __forceinline__ std::uint32_t row_address(Book<kBook>, std::uint32_t part) const {
    constexpr int kBit = kBook * kCodeBits;
    constexpr int kWord = kBit / 32;
    constexpr int kShift = kBit % 32;
    constexpr std::uint32_t kMask = ((1u << kCodeBits) - 1) << 7;
    std::uint32_t shifted;
    if constexpr (kShift + kCodeBits > 32) {
      shifted = __funnelshift_r(words_[kWord], words_[kWord + 1], kShift) << 7;
    } else if constexpr (kShift >= 7) {
      shifted = words_[kWord] >> (kShift - 7);
    } else {
      shifted = words_[kWord] << (7 - kShift);
    }
    return (shifted & kMask) | part;
  }

  template <class Function>
  __device__ __forceinline__ void for_each_book(Function function) const {
    visit<0>(function);
  }

 private:
  static constexpr int kWords = kNumBooks * kCodeBits / 32;
  static constexpr int kTail = kNumBooks * kCodeBits % 32;

  template <int kBook, class Function>
  __device__ __forceinline__ static void visit(Function function) {
    if constexpr (kBook < kNumBooks) {
      function(Book<kBook>());
      visit<kBook + 1>(function);
    }
  }

  std::uint32_t words_[kWords + (kTail > 0 ? 1 : 0)];
};

/// Codes of any shape: each is read from the page when it is used.
class AnyCodes {
 public:
  __device__ __forceinline__ void fetch(const DevicePageLayout& layout, const KeyPlane& plane,
                                        const std::uint8_t* page, int head, int slot) {
    words_ = reinterpret_cast<const std::uint32_t*>(page + layout.key_words(plane, head, slot));
    num_words_ = plane.num_words;
    num_books_ = plane.num_books;
    code_bits_ = layout.code_bits;
    codebook_size_ = layout.codebook_size;
    tail_ = 0;
    if (plane.tail_bits > 0) {
      const int bit = layout.key_tail_bit(plane, head, slot);
      const auto* const tail = reinterpret_cast<const std::uint32_t*>(page) + bit / 32;
      tail_ = __funnelshift_r(tail[0], tail[1], static_cast<std::uint32_t>(bit % 32));
    }
  }

  __device__ __forceinline__ static uint4 load(int, std::uint32_t address) {
    return load_shared_16<0>(address);
  }
  __device__ __forceinline__ std::uint32_t row_address(int book, std::uint32_t part) const {
    return part + (book * codebook_size_ + code(book)) * 128;
  }
  /// Address of the row of book `book + which`, where two books share lines and `book` is even.
  __device__ __forceinline__ std::uint32_t pair_address(int book, int which,
                                                        std::uint32_t part) const {
    // Zeros fill the last lines of an odd number of books.
    const std::uint32_t row = book + which < num_books_ ? code(book + which) : 0;
    return part + (book / 2 * codebook_size_ + row) * 128;
  }

  template <class Function>
  __device__ __forceinline__ void for_each_book(Function function) const {
    for (int book = 0; book < num_books_; ++book) function(book);
  }
  template <class Function>
  __device__ __forceinline__ void for_each_pair(Function function) const {
    for (int book = 0; book < num_books_; book += 2) function(book);
  }

 private:
  __device__ __forceinline__ std::uint32_t code(int book) const {
    const int bit = book * code_bits_;
    const int word = bit / 32;
    const std::uint32_t low = word < num_words_ ? words_[word] : tail_;
    const std::uint32_t high = word + 1 < num_words_ ? words_[word + 1] : tail_;
    return __funnelshift_r(low, high, static_cast<std::uint32_t>(bit % 32)) &
           ((1u << code_bits_) - 1);
  }

  const std::uint32_t* words_;
  int num_words_;
  int num_books_;
  int code_bits_;
  int codebook_size_;
  std::uint32_t tail_;
};

}  // namespace commvq::cuda
