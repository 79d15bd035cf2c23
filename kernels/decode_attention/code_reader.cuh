#pragma once

#include <cstdint>

#include "common/memory.cuh"

namespace commvq::cuda {

/// Where the codes of one plane lie in a page: what the kernel needs of `KeyPlane`.
struct KeyCodes {
  int num_books;
  int code_bits;
  int codebook_size;
  int num_words;
  int tail_bits;
  int words;  ///< bytes from the page's start
  int tails;  ///< bytes from the page's start
};

/// A compile-time book number.
template <int kBook>
struct Book {
  static constexpr int kNumber = kBook;
};

/// The codes of one token and plane whose shape is known at compile time: a few registers, from
/// which every code is one shift and one mask.
template <int kCodeBits, int kNumBooks>
class FixedCodes {
 public:
  /// Any bits are codes: none can lead beyond a book.
  static constexpr bool kAnyBitsAreCodes = true;

  /// `index` is head * page_size + slot.
  __device__ __forceinline__ void fetch(const KeyCodes& codes, const std::uint8_t* page,
                                        int index) {
    fetch_at(page + (codes.words + index * (kWords * 4)),
             page + (codes.tails + index * kTail / 32 * 4));
  }
  /// The codes of a token and of the sixteenth after it, on the same page.
  __device__ __forceinline__ static void fetch_two(const KeyCodes& codes, const std::uint8_t* page,
                                                   int index, FixedCodes (&two)[2]) {
    static_assert(kTail % 2 == 0);
    const std::uint8_t* const words = page + (codes.words + index * (kWords * 4));
    const std::uint8_t* const tail = page + (codes.tails + index * kTail / 32 * 4);
    two[0].fetch_at(words, tail);
    two[1].fetch_at(words + 16 * kWords * 4, tail + 16 * kTail / 8);
  }

  /// Uses what was fetched of `index`: until then the loads may be under way.
  __device__ __forceinline__ void finish(const KeyCodes&, int index) {
    words_[kWords] =
        __funnelshift_r(words_[kWords], next_tail_, static_cast<std::uint32_t>(index * kTail));
  }

  /// Address of the code's row at 128 bytes a row, less the book's distance from the first one;
  /// `part` is the rows' address, which leaves the bits of a code free, and the place in the row.
  template <int kBook>
  __device__ __forceinline__ std::uint32_t row_address(Book<kBook> book, std::uint32_t part) const {
    return row_address(shifted(book), part);
  }
  /// The same of a `shifted` code.
  __device__ __forceinline__ static std::uint32_t row_address(std::uint32_t shifted,
                                                              std::uint32_t part) {
    return (shifted & (((1u << kCodeBits) - 1) << 7)) | part;
  }
  /// The code times 128, among other bits.
  template <int kBook>
  __device__ __forceinline__ std::uint32_t shifted(Book<kBook>) const {
    constexpr int kBit = kBook * kCodeBits;
    constexpr int kWord = kBit / 32;
    constexpr int kShift = kBit % 32;
    if constexpr (kShift + kCodeBits > 32) {
      return __funnelshift_r(words_[kWord], words_[kWord + 1], kShift - 7);
    } else if constexpr (kShift >= 7) {
      return words_[kWord] >> (kShift - 7);
    } else {
      return words_[kWord] << (7 - kShift);
    }
  }

  /// Calls function(book, the next one or, at the end, the same) for every second book.
  template <class Function>
  __device__ __forceinline__ static void for_each_two_books(Function function) {
    visit_two<0>(function);
  }
  /// Bytes that the lines of one number take, for all centroids.
  static constexpr int kLineBytes = 128 << kCodeBits;
  /// Numbers of lines, where two books share one.
  static constexpr int kTwoBookLines = (kNumBooks + 1) / 2;
  /// Sixteen bytes at `address`, as `row_address` gives it, in lines kLine.
  template <int kLine>
  __device__ __forceinline__ static uint4 load_line(std::uint32_t address) {
    return load_shared_16<kLine * kLineBytes>(address);
  }

 private:
  static constexpr int kWords = (kNumBooks * kCodeBits - 1) / 32;
  static constexpr int kTail = kNumBooks * kCodeBits - kWords * 32;

  std::uint32_t words_[kWords + 1];
  std::uint32_t next_tail_;

  __device__ __forceinline__ void fetch_at(const std::uint8_t* words, const std::uint8_t* tail) {
    if constexpr (kWords == 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(words);
      words_[0] = v.x, words_[1] = v.y, words_[2] = v.z, words_[3] = v.w;
    } else if constexpr (kWords == 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(words);
      words_[0] = v.x, words_[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words_[i] = reinterpret_cast<const std::uint32_t*>(words)[i];
    }
    const auto* const two = reinterpret_cast<const std::uint32_t*>(tail);
    words_[kWords] = two[0];
    // The next word belongs to the page as well: norms follow the tails.
    next_tail_ = 32 % kTail == 0 ? 0 : two[1];
  }

  template <int kBook, class Function>
  __device__ __forceinline__ static void visit_two(Function function) {
    if constexpr (kBook < kNumBooks) {
      constexpr bool kIsTwo = kBook + 1 < kNumBooks;
      function(Book<kBook>(), Book<kBook + kIsTwo>());
      visit_two<kBook + 2>(function);
    }
  }
};

/// Codes of any shape: each is read from the page when it is used.
class AnyCodes {
 public:
  static constexpr bool kAnyBitsAreCodes = false;

  __device__ __forceinline__ void fetch(const KeyCodes& codes, const std::uint8_t* page,
                                        int index) {
    codes_ = &codes;
    words_ = reinterpret_cast<const std::uint32_t*>(page + codes.words) + index * codes.num_words;
    const int bit = index * codes.tail_bits;
    const auto* const tail = reinterpret_cast<const std::uint32_t*>(page + codes.tails) + bit / 32;
    tail_ = __funnelshift_r(tail[0], tail[1], static_cast<std::uint32_t>(bit));
  }

  __device__ __forceinline__ void finish(const KeyCodes&, int) {}

  __device__ __forceinline__ static uint4 load(int, std::uint32_t address) {
    return load_shared_16<0>(address);
  }
  __device__ __forceinline__ std::uint32_t row_address(int book, std::uint32_t part) const {
    return part + (book * codes_->codebook_size + code(book)) * 128;
  }
  /// Address of the row of book `book + which`, where two books share lines and `book` is even.
  __device__ __forceinline__ std::uint32_t pair_address(int book, int which,
                                                        std::uint32_t part) const {
    // Zeros fill the last lines of an odd number of books.
    const std::uint32_t row = book + which < codes_->num_books ? code(book + which) : 0;
    return part + (book / 2 * codes_->codebook_size + row) * 128;
  }

  template <class Function>
  __device__ __forceinline__ void for_each_book(Function function) const {
#pragma unroll 2
    for (int book = 0; book < codes_->num_books; ++book) function(book);
  }
  template <class Function>
  __device__ __forceinline__ void for_each_pair(Function function) const {
#pragma unroll 1
    for (int book = 0; book < codes_->num_books; book += 2) function(book);
  }

 private:
  __device__ __forceinline__ std::uint32_t code(int book) const {
    const int bit = book * codes_->code_bits;
    const int word = bit / 32;
    const std::uint32_t low = word < codes_->num_words ? words_[word] : tail_;
    const std::uint32_t high = word + 1 < codes_->num_words ? words_[word + 1] : tail_;
    return __funnelshift_r(low, high, static_cast<std::uint32_t>(bit)) &
           ((1u << codes_->code_bits) - 1);
  }

  const KeyCodes* codes_;
  const std::uint32_t* words_;
  std::uint32_t tail_;
};

}  // namespace commvq::cuda
