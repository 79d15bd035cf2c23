#pragma once

#include <cstdint>

#include "decode_attention/key_codes.hpp"

namespace commvq::cuda {

/// Where rows have 4 bits: the codes of one plane and head in a page.
struct alignas(16) StageCodesPlace {
  int words;  ///< bytes from the page's start to the first token's
  int tails;  ///< likewise
  int num_words;
  int tail_bits;  ///< a multiple of four

  __device__ __forceinline__ StageCodesPlace(const KeyCodes& codes, int head, int page_size)
      : words(codes.words + head * page_size * codes.num_words * 4),
        tails(codes.tails + head * page_size / 16 * codes.tail_bits * 2),
        num_words(codes.num_words),
        tail_bits(codes.tail_bits) {}
  __device__ __forceinline__ const std::uint8_t* words_of(const std::uint8_t* page,
                                                          unsigned slot) const {
    return page + (static_cast<unsigned>(words) + slot * static_cast<unsigned>(num_words) * 4);
  }
  __device__ __forceinline__ const std::uint8_t* tail_of(const std::uint8_t* page,
                                                         unsigned slot) const {
    return page + (static_cast<unsigned>(tails) + slot * static_cast<unsigned>(tail_bits) / 32 * 4);
  }
};

/// The codes of one token that a lane needs where rows have 4 bits: of one plane of four, of
/// kGroups stages or one less, twelve bits each, for the lines of kGroups groups. A few registers.
template <int kGroups>
class StageCodes {
 public:
  static constexpr int kRowBits = 4;
  /// Kernels with up to so many tiles of rows have registers left for what saves some time.
  static constexpr int kTilesWithRegisters = kGroups < 6 ? 2 : 1;
  /// Any bits are codes: none can lead beyond a book, and rows of books that are not there are
  /// zeros.
  static constexpr bool kAnyBitsAreCodes = true;

  __device__ __forceinline__ void fetch(const std::uint8_t* words, const std::uint8_t* tail) {
    // What lies behind belongs to the page as well: norms follow the tails.
#pragma unroll
    for (int i = 0; i < kWords; ++i) words_[i] = reinterpret_cast<const std::uint32_t*>(words)[i];
    words_[kWords] = reinterpret_cast<const std::uint32_t*>(tail)[0];
    next_tail_ = reinterpret_cast<const std::uint32_t*>(tail)[1];
  }

  /// Uses what was fetched: until then the loads may be under way. Of the token's slot only what is
  /// left of a division by eight, `slot`, matters.
  __device__ __forceinline__ void finish(const StageCodesPlace& place, int slot) {
    const std::uint32_t tail = __funnelshift_r(words_[kWords], next_tail_,
                                               static_cast<std::uint32_t>(slot * place.tail_bits));
    words_[kWords] = tail;
    // A stage less may take a word less.
    if constexpr (kWords > 0)
      if (place.num_words < kWords) words_[kWords - 1] = tail;
    const bool has_last = place.num_words * 32 + place.tail_bits == kGroups * kStageBits;
    last_ = has_last ? of_stage(kGroups - 1) : of_stage(0);
  }

  /// The two codes of the lane's line in group `group`, a constant after unrolling: the lowest bits
  /// of what is returned. In the place of a stage that the plane lacks, there are second numbers of
  /// its first one.
  __device__ __forceinline__ std::uint32_t of_line(int group) const {
    return group + 1 < kGroups ? of_stage(group) : last_;
  }

 private:
  static constexpr int kStageBits = 12;
  static constexpr int kWords = (kGroups * kStageBits - 1) / 32;

  std::uint32_t words_[kWords + 1];
  std::uint32_t next_tail_;
  std::uint32_t last_;

  __device__ __forceinline__ std::uint32_t of_stage(int group) const {
    const auto word = [&](int i) { return i <= kWords ? words_[i] : 0; };
    const int bit = kStageBits * group;
    return __funnelshift_r(word(bit / 32), word(bit / 32 + 1), bit % 32);
  }
};

/// Codes of any shape, where rows have 8 bits: each is read from the page when it is used.
class AnyCodes {
 public:
  static constexpr int kRowBits = 8;
  static constexpr int kTilesWithRegisters = 2;
  static constexpr bool kAnyBitsAreCodes = false;

  __device__ __forceinline__ void fetch(const KeyCodes& codes, const std::uint8_t* page,
                                        int index) {
    codes_ = &codes;
    words_ = reinterpret_cast<const std::uint32_t*>(page + codes.words) + index * codes.num_words;
    const int bit = index * codes.tail_bits;
    const auto* const tail = reinterpret_cast<const std::uint32_t*>(page + codes.tails) + bit / 32;
    tail_ = __funnelshift_r(tail[0], tail[1], static_cast<std::uint32_t>(bit));
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
