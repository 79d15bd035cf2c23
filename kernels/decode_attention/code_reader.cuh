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
      const Index bit = layout.key_tail_bit(plane, head, slot);
      const auto* const tail = reinterpret_cast<const std::uint32_t*>(page) + bit / 32;
      // The next word belongs to the page as well: norms follow the tails.
      const std::uint32_t next = 32 % kTail == 0 ? 0 : tail[1];
      words_[kWords] = __funnelshift_r(tail[0], next, static_cast<std::uint32_t>(bit % 32));
    }
  }

  /// Byte offset of a book's first line, at 128 bytes a row, and of the code's line from it.
  template <int kBook>
  __device__ __forceinline__ static constexpr std::uint32_t book_offset(Book<kBook>) {
    return kBook << (kCodeBits + 7);
  }
  template <int kBook>
  __device__ __forceinline__ std::uint32_t line(Book<kBook>) const {
    constexpr int kBit = kBook * kCodeBits;
    constexpr int kWord = kBit / 32;
    constexpr int kShift = kBit % 32;
    constexpr std::uint32_t kMask = ((1u << kCodeBits) - 1) << 7;
    if constexpr (kShift + kCodeBits > 32) {
      return __funnelshift_r(words_[kWord], words_[kWord + 1], kShift) << 7 & kMask;
    } else if constexpr (kShift >= 7) {
      return words_[kWord] >> (kShift - 7) & kMask;
    } else {
      return words_[kWord] << (7 - kShift) & kMask;
    }
  }
  template <int kBook>
  __device__ __forceinline__ std::uint32_t next_line(Book<kBook>) const {
    if constexpr (kBook + 1 < kNumBooks) {
      return line(Book<kBook + 1>());
    } else {
      return 0;  // zeros fill the last line of an odd number of books
    }
  }

  template <class Function>
  __device__ __forceinline__ static void for_each_book(Function function, const FixedCodes&) {
    visit<0, 1>(function);
  }
  template <class Function>
  __device__ __forceinline__ static void for_each_pair(Function function, const FixedCodes&) {
    visit<0, 2>(function);
  }

 private:
  static constexpr int kWords = kNumBooks * kCodeBits / 32;
  static constexpr int kTail = kNumBooks * kCodeBits % 32;

  template <int kBook, int kStep, class Function>
  __device__ __forceinline__ static void visit(Function function) {
    if constexpr (kBook < kNumBooks) {
      function(Book<kBook>());
      visit<kBook + kStep, kStep>(function);
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
      const Index bit = layout.key_tail_bit(plane, head, slot);
      const auto* const tail = reinterpret_cast<const std::uint32_t*>(page) + bit / 32;
      tail_ = __funnelshift_r(tail[0], tail[1], static_cast<std::uint32_t>(bit % 32));
    }
  }

  __device__ __forceinline__ std::uint32_t book_offset(int book) const {
    return static_cast<std::uint32_t>(book) * codebook_size_ * 128;
  }
  __device__ __forceinline__ std::uint32_t line(int book) const {
    const int bit = book * code_bits_;
    const int word = bit / 32;
    const std::uint32_t low = word < num_words_ ? words_[word] : tail_;
    const std::uint32_t high = word + 1 < num_words_ ? words_[word + 1] : tail_;
    const std::uint32_t code =
        __funnelshift_r(low, high, static_cast<std::uint32_t>(bit % 32)) & ((1u << code_bits_) - 1);
    return code * 128;
  }
  __device__ __forceinline__ std::uint32_t next_line(int book) const {
    return book + 1 < num_books_ ? line(book + 1) : 0;
  }

  template <class Function>
  __device__ __forceinline__ static void for_each_book(Function function, const AnyCodes& codes) {
    for (int book = 0; book < codes.num_books_; ++book) function(book);
  }
  template <class Function>
  __device__ __forceinline__ static void for_each_pair(Function function, const AnyCodes& codes) {
    for (int book = 0; book < codes.num_books_; book += 2) function(book);
  }

 private:
  const std::uint32_t* words_;
  int num_words_;
  int num_books_;
  int code_bits_;
  int codebook_size_;
  std::uint32_t tail_;
};

}  // namespace commvq::cuda
