#pragma once

#include <cstdint>

#include "commvq/cuda/page_layout.hpp"

#include "decode_attention/key_codes.hpp"

namespace commvq::cuda {

/// Bits of a stage's two codes where rows have 4 bits.
constexpr int kStageBits = 12;

/// Where rows have 4 bits: the codes of one plane and head in a page.
struct alignas(16) PlaneCodes {
  int words;   ///< bytes from the page's start to the first token's
  int tails;   ///< likewise
  bool whole;  ///< as many stages as groups, else one less

  __device__ __forceinline__ PlaneCodes(const KeyCodes& codes, int num_groups, int head,
                                        int page_size)
      : words(codes.words + head * page_size * codes.num_words * 4),
        tails(codes.tails + head * page_size / 16 * codes.tail_bits * 2),
        whole(codes.num_books == 2 * num_groups) {}
};

/// The codes of one token that a lane needs where rows have 4 bits: of one plane of four, of
/// kGroups stages or one less, for the lines of kGroups groups.
template <int kGroups>
class StageCodes {
 public:
  /// Words of a plane of kGroups stages, whole ones and one more for what is left.
  static constexpr int kWords = KeyPlane::whole_words(kGroups * kStageBits) + 1;

  __device__ __forceinline__ StageCodes(const std::uint32_t (&words)[kWords], bool whole) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words_[i] = words[i];
    last_ = whole ? of_stage(kGroups - 1) : of_stage(0);
  }

  /// The two codes of the lane's line in group `group`, a constant after unrolling: the lowest bits
  /// of what is returned. In the place of a stage that the plane lacks, there are second numbers of
  /// its first one.
  __device__ __forceinline__ std::uint32_t of_line(int group) const {
    return group + 1 < kGroups ? of_stage(group) : last_;
  }

 private:
  std::uint32_t words_[kWords];
  std::uint32_t last_;

  __device__ __forceinline__ std::uint32_t of_stage(int group) const {
    const auto word = [&](int i) { return i < kWords ? words_[i] : 0; };
    const int bit = kStageBits * group;
    return __funnelshift_r(word(bit / 32), word(bit / 32 + 1), bit % 32);
  }
};

/// Those of four tokens in a row, from a slot on that is a multiple of four: what was read of the
/// page, in a few registers. Nothing of it is used before `token`, so that the loads may be under
/// way.
template <int kNumGroups>
class QuadCodes {
 public:
  static constexpr int kGroups = kNumGroups;
  static constexpr int kRowBits = 4;
  /// Kernels with up to so many tiles of rows have registers left for what saves some time.
  static constexpr int kTilesWithRegisters = kGroups < 5 ? 2 : 1;

  /// `slot` is the first token's. Any bits are codes, which cannot lead beyond a book, and rows of
  /// books that are not there are zeros; so tokens that are not there do no harm.
  __device__ __forceinline__ void fetch(const PlaneCodes& plane, const std::uint8_t* page,
                                        unsigned slot) {
    const bool whole = plane.whole;
    const auto* const words = reinterpret_cast<const uint4*>(
        page +
        (static_cast<unsigned>(plane.words) + slot * (whole ? 4 * kWhole.words : 4 * kLess.words)));
#pragma unroll
    for (int i = 0; i < kWhole.words; ++i) {
      const uint4 v = i < kLess.words || whole ? words[i] : make_uint4(0, 0, 0, 0);
      words_[4 * i] = v.x, words_[4 * i + 1] = v.y;
      words_[4 * i + 2] = v.z, words_[4 * i + 3] = v.w;
    }
    const auto* const tails = reinterpret_cast<const std::uint32_t*>(
        page +
        (static_cast<unsigned>(plane.tails) + slot * (whole ? kWhole.tail : kLess.tail) / 32 * 4));
#pragma unroll
    for (int i = 0; i < kTailWords; ++i)
      tails_[i] = i < (whole ? tail_words(kWhole.tail) : tail_words(kLess.tail)) ? tails[i] : 0;
  }

  /// The codes of token i of the four, a constant after unrolling.
  __device__ __forceinline__ StageCodes<kGroups> token(const PlaneCodes& plane, int i) const {
    const bool whole = plane.whole;
    const std::uint32_t tail = tail_of(whole, i);
    std::uint32_t words[StageCodes<kGroups>::kWords];
#pragma unroll
    for (int w = 0; w < kWhole.words; ++w)
      words[w] = whole             ? words_[i * kWhole.words + w]
                 : w < kLess.words ? words_[i * kLess.words + w]
                                   : tail;
    words[kWhole.words] = tail;
    return {words, whole};
  }

 private:
  /// Of a token's codes in a plane.
  struct Shape {
    int words;  ///< whole ones
    int tail;   ///< bits that are left, a multiple of four

    explicit constexpr Shape(int stages)
        : words(KeyPlane::whole_words(stages * kStageBits)),
          tail(stages * kStageBits - 32 * words) {}
  };
  static constexpr Shape kWhole{kGroups}, kLess{kGroups - 1};

  /// Bits of a word before the tails of four tokens, at most: those of eight begin with a word.
  __host__ __device__ static constexpr int most_before(int tail) {
    return tail % 8 == 4 ? 16 : 0;
  }
  /// Words that tails of four tokens touch.
  __host__ __device__ static constexpr int tail_words(int tail) {
    return (most_before(tail) + 4 * tail + 31) / 32;
  }
  static constexpr int kTailWords = tail_words(kWhole.tail) > tail_words(kLess.tail)
                                        ? tail_words(kWhole.tail)
                                        : tail_words(kLess.tail);

  std::uint32_t words_[4 * kWhole.words + (kWhole.words == 0)];
  std::uint32_t tails_[kTailWords];

  __device__ __forceinline__ std::uint32_t tail_of(bool whole, int i) const {
    const int tail = whole ? kWhole.tail : kLess.tail;
    const int bit = static_cast<int>(threadIdx.x) % 32 / 4 * 4 * tail % 32 + i * tail;
    // Between these words it begins: few, for which a lane chooses.
    const int least = i * min(kWhole.tail, kLess.tail) / 32;
    const int most =
        max(i * kWhole.tail + most_before(kWhole.tail), i * kLess.tail + most_before(kLess.tail)) /
        32;
    const auto word = [&](int k) { return tails_[k < kTailWords ? k : kTailWords - 1]; };
    std::uint32_t low = word(least), high = word(least + 1);
#pragma unroll
    for (int k = 1; k < kTailWords; ++k)
      if (k > least && k <= most && bit / 32 >= k) low = word(k), high = word(k + 1);
    return __funnelshift_r(low, high, static_cast<std::uint32_t>(bit));
  }
};

/// Codes of any shape, where rows have 8 bits: each is read from the page when it is used.
class AnyCodes {
 public:
  static constexpr int kRowBits = 8;
  static constexpr int kTilesWithRegisters = 2;

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
