#pragma once

#include <cstdint>

#include "commvq/cuda/page_layout.hpp"

#include <cuda_runtime_api.h>

/// Kernels of the key learner. Pointers are device memory; everything is enqueued on the given
/// stream. `width` is 2g, the numbers of a row; residuals and rows of books are planar.
namespace commvq::cuda::key_learner {

/// Widest beam (its candidates have four bits in a sort key) and most centroids of a book (their
/// terms lie in shared memory).
inline constexpr int kMaxBeamWidth = 16;
inline constexpr int kMaxCodebookSize = 512;
/// Residuals whose assignments one thread block sums up.
inline constexpr int kChunkKeys = 256;

inline Index num_chunks(Index num_keys) {
  return (num_keys + kChunkKeys - 1) / kChunkKeys;
}

/// Both books of one stage, in device memory.
struct StageBooks {
  int codebook_size;           ///< Nc
  int width;
  const float* rows;           ///< [2 Nc][width], Z_0 then Z_1
  const float* squared_norms;  ///< [2 Nc]
  const float* cross_terms;    ///< [a][b]: 2 <Z_0[a], Z_1[b]>, then the same [b][a]
};

/// The codebook of one head.
struct HeadBooks {
  int num_groups, num_stages, codebook_size, width;
  const float* rows;  ///< as KeyCodebook::rows
  COMMVQ_HOST_DEVICE int num_codes() const { return num_groups * num_stages * 2; }
  COMMVQ_HOST_DEVICE int head_dim() const { return num_groups * width; }
};

/// residuals [num_keys][width] = the group's part of keys [num_keys][head_dim] less the rows that
/// the codes of its first `stage` stages name. squared_norms [num_keys]: of the residuals.
void make_residuals(const HeadBooks& books, int group, int stage, Index num_keys,
                    const float* keys, const std::uint16_t* codes, float* residuals,
                    float* squared_norms, cudaStream_t stream);

/// What `soft_assign` reads and writes.
struct Assignment {
  Index num_keys;
  float inverse_temperature;
  float* products;             ///< [num_keys][2 Nc]: <x, Z>; becomes p(A | x), p(B | x)
  float* terms;                ///< [num_keys][2 Nc], work
  float* best_scores;          ///< [num_keys], work: |x|^2 less the least squared distance
  float* least_errors;         ///< [num_keys], work: least squared distance
  float* log2_totals;          ///< [num_keys], work
  const float* squared_norms;  ///< [num_keys]: |x|^2
  float* chunk_weights;        ///< [num_chunks][Nc][Nc], work
  double* chunk_errors;        ///< [num_chunks]: sums of the least squared distances
  double* pair_weights;        ///< [Nc][Nc]: w_AB
};
/// p(A, B | x) = softmax of -|x - Z_0[A] - Z_1[B]|^2 / temperature.
void soft_assign(const StageBooks& books, const Assignment& assignment, cudaStream_t stream);

/// The nearest centre of every residual, of products as above: codes[t * stride], A and B.
void assign_nearest(const StageBooks& books, Index num_keys, const float* products,
                    std::uint16_t* codes, Index stride, cudaStream_t stream);

/// Candidates of a beam: `width` a key.
struct Beam {
  Index num_keys;
  int width;
  const float* residuals;  ///< [num_keys][width][row width]
  const float* errors;     ///< [num_keys][width]
};
/// Chooses the `new_width` best extensions of every key's candidates, in order. `products` is
/// [num_keys][width][2 Nc]: <residual, Z>. `choices` [num_keys][new_width]: candidate << 28 |
/// a << 14 | b; new residuals and errors as in `Beam`. Returns false if the device lacks the shared
/// memory.
[[nodiscard]] bool extend_beam(const StageBooks& books, const Beam& beam, const float* products,
                               int new_width, std::uint32_t* choices, float* new_residuals,
                               float* new_errors, cudaStream_t stream);

/// Codes of the best candidate: `choices` [num_stages][choices_stride], those of a stage
/// [num_keys][widths[stage]]; codes[t * stride], num_stages pairs. `widths` is host memory.
void trace_beam(Index num_keys, int num_stages, const int* widths, const std::uint32_t* choices,
                Index choices_stride, std::uint16_t* codes, Index stride, cudaStream_t stream);

/// errors [num_keys]: |key - decoded|^2.
void squared_errors(const HeadBooks& books, Index num_keys, const float* keys,
                    const std::uint16_t* codes, double* errors, cudaStream_t stream);

/// Replaces codes and errors of a key by `new_codes` and `new_errors` where those are less.
void keep_better(Index num_keys, int num_codes, const std::uint16_t* new_codes,
                 const double* new_errors, std::uint16_t* codes, double* errors,
                 cudaStream_t stream);

/// counts [2 R Nc][2 R Nc]: keys of which two codes of a group are; cleared first. sums
/// [2 R Nc][width]: of the group's part of the keys that have a code. `chunk_sums` is work,
/// [kSumChunks][2 R Nc][width]. Returns false if the device lacks the shared memory.
inline constexpr int kSumChunks = 32;
[[nodiscard]] bool count_occurrences(const HeadBooks& books, int group, Index num_keys,
                                     const float* keys, const std::uint16_t* codes, int* counts,
                                     float* chunk_sums, double* sums, cudaStream_t stream);

}  // namespace commvq::cuda::key_learner
