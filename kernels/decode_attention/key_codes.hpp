#pragma once

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

}  // namespace commvq::cuda
