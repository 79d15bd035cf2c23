#include <cfloat>

#include "common/sort_key.cuh"
#include "kernels.hpp"

// Beam search as `KeyEncoder` does it, one stage a launch. An extension's error is
//     (|r|^2 + |Z_0[a]|^2 - 2 <r, Z_0[a]>)   "term of a"
//   + (|Z_1[b]|^2 - 2 <r, Z_1[b]>)           "term of b"
//   + 2 <Z_0[a], Z_1[b]>                     "cross term".
// A warp does one key: first the least error of every (candidate, a) over b; then it takes the
// least of them, looks for its b and for the next error of the same (candidate, a), and so on.

namespace commvq::cuda::key_learner {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kGroup = 4;  ///< candidates whose errors a lane computes at once

/// Shared memory of a warp: [candidates][Nc] terms of a, terms of b and least errors.
struct WarpTables {
  float* of_a;
  float* of_b;
  float* least;
  int size;  ///< Nc
};

__host__ __device__ int padded_candidates(int width) {
  return (width + kGroup - 1) / kGroup * kGroup;
}
__host__ __device__ int floats_per_warp(int width, int size) {
  return 3 * padded_candidates(width) * size;
}

__device__ void read_terms(const StageBooks& books, const Beam& beam, const float* products,
                           Index key, int lane, const WarpTables& tables) {
  const int size = books.codebook_size;
  for (int c = 0; c < padded_candidates(beam.width); ++c)
    for (int i = lane; i < size; i += 32) {
      const bool used = c < beam.width;
      const float* const of_candidate = products + (key * beam.width + c) * 2 * size;
      const float error = used ? beam.errors[key * beam.width + c] : 0.0f;
      tables.of_a[c * size + i] =
          used ? error + books.squared_norms[i] - 2 * of_candidate[i] : FLT_MAX;
      tables.of_b[c * size + i] =
          used ? books.squared_norms[size + i] - 2 * of_candidate[size + i] : 0.0f;
    }
  __syncwarp();
}

__device__ void fill_least(const StageBooks& books, int width, int lane, const WarpTables& tables) {
  const int size = books.codebook_size;
  const float* const by_b = books.cross_terms + Index{size} * size;
  for (int a = lane; a < size; a += 32)
    for (int c = 0; c < width; c += kGroup) {
      float least[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) least[i] = FLT_MAX;
      for (int b = 0; b < size; ++b) {
        const float cross = by_b[b * size + a];
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
          least[i] = fminf(least[i], tables.of_b[(c + i) * size + b] + cross);
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        tables.least[(c + i) * size + a] = tables.of_a[(c + i) * size + a] + least[i];
    }
  __syncwarp();
}

/// The first extension (candidate, a, any b) after `last`; kLastKey: none.
__device__ SortKey next_extension(const StageBooks& books, const WarpTables& tables, int candidate,
                                  int a, SortKey last, int lane) {
  const int size = books.codebook_size;
  const float* const cross = books.cross_terms + a * size;
  const float of_a = tables.of_a[candidate * size + a];
  SortKey least = kLastKey;
  for (int b = lane; b < size; b += 32) {
    const SortKey key =
        sort_key(of_a + (tables.of_b[candidate * size + b] + cross[b]), candidate, a, b);
    if (key > last && key < least) least = key;
  }
  return warp_least(least);
}

/// The least of a lane's entries (candidate, a); its b is 0.
__device__ SortKey least_entry(const WarpTables& tables, int width, int lane) {
  SortKey least = kLastKey;
  for (int c = 0; c < width; ++c)
    for (int a = lane; a < tables.size; a += 32) {
      const SortKey key = sort_key(tables.least[c * tables.size + a], c, a, 0);
      least = key < least ? key : least;
    }
  return least;
}

__global__ void __launch_bounds__(kMaxWarps * 32)
    choose_kernel(StageBooks books, Beam beam, const float* products, int new_width,
                  std::uint32_t* choices, float* new_errors) {
  extern __shared__ float shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, size = books.codebook_size;
  const Index key = Index{blockIdx.x} * (blockDim.x / 32) + warp;
  if (key >= beam.num_keys) return;
  float* const own = shared + warp * floats_per_warp(beam.width, size);
  const int of_one = padded_candidates(beam.width) * size;
  const WarpTables tables{own, own + of_one, own + 2 * of_one, size};
  read_terms(books, beam, products, key, lane, tables);
  fill_least(books, beam.width, lane, tables);

  SortKey mine = least_entry(tables, beam.width, lane), last = 0;
  for (int i = 0; i < new_width; ++i) {
    const auto entry = static_cast<std::uint32_t>(warp_least(mine));
    const int candidate = candidate_of(entry), a = a_of(entry);
    const SortKey chosen = next_extension(books, tables, candidate, a, last, lane);
    const SortKey next = next_extension(books, tables, candidate, a, chosen, lane);
    if (lane == 0) {
      choices[key * new_width + i] = static_cast<std::uint32_t>(chosen);
      new_errors[key * new_width + i] = error_of(chosen);
    }
    if (lane == a % 32) {
      tables.least[candidate * size + a] = next == kLastKey ? FLT_MAX : error_of(next);
      mine = least_entry(tables, beam.width, lane);
    }
    last = chosen;
    __syncwarp();
  }
}

constexpr int kThreads = 256;

/// A warp a new candidate.
__global__ void __launch_bounds__(kThreads)
    move_residuals_kernel(StageBooks books, Beam beam, int new_width, const std::uint32_t* choices,
                          float* new_residuals) {
  const int lane = threadIdx.x % 32;
  const Index to = Index{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  if (to >= beam.num_keys * new_width) return;
  const std::uint32_t choice = choices[to];
  const Index from = to / new_width * beam.width + candidate_of(choice);
  const float* const row_a = books.rows + Index{a_of(choice)} * books.width;
  const float* const row_b = books.rows + Index{books.codebook_size + b_of(choice)} * books.width;
  for (int i = lane; i < books.width; i += 32)
    new_residuals[to * books.width + i] =
        beam.residuals[from * books.width + i] - row_a[i] - row_b[i];
}

struct Widths {
  int of[256];
};

__global__ void trace_kernel(Index num_keys, int num_stages, Widths widths,
                             const std::uint32_t* choices, Index choices_stride,
                             std::uint16_t* codes, Index stride) {
  const Index key = Index{blockIdx.x} * blockDim.x + threadIdx.x;
  if (key >= num_keys) return;
  int candidate = 0;
  for (int stage = num_stages - 1; stage >= 0; --stage) {
    const std::uint32_t choice =
        choices[stage * choices_stride + key * widths.of[stage] + candidate];
    candidate = candidate_of(choice);
    codes[key * stride + 2 * stage] = static_cast<std::uint16_t>(a_of(choice));
    codes[key * stride + 2 * stage + 1] = static_cast<std::uint16_t>(b_of(choice));
  }
}

unsigned blocks_for(Index count, Index per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

int shared_memory_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
      cudaSuccess)
    return 0;
  return bytes;
}

}  // namespace

bool extend_beam(const StageBooks& books, const Beam& beam, const float* products, int new_width,
                 std::uint32_t* choices, float* new_residuals, float* new_errors,
                 cudaStream_t stream) {
  const int of_warp = 4 * floats_per_warp(beam.width, books.codebook_size);
  const int limit = shared_memory_limit();
  const int warps = limit / 2 / of_warp < kMaxWarps ? limit / 2 / of_warp : kMaxWarps;
  if (warps < 1) return false;
  if (cudaFuncSetAttribute(choose_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit) !=
      cudaSuccess)
    return false;
  choose_kernel<<<blocks_for(beam.num_keys, warps), 32u * static_cast<unsigned>(warps),
                  static_cast<std::size_t>(warps * of_warp), stream>>>(
      books, beam, products, new_width, choices, new_errors);
  move_residuals_kernel<<<blocks_for(beam.num_keys * new_width, kThreads / 32), kThreads, 0,
                          stream>>>(books, beam, new_width, choices, new_residuals);
  return true;
}

void trace_beam(Index num_keys, int num_stages, const int* widths, const std::uint32_t* choices,
                Index choices_stride, std::uint16_t* codes, Index stride, cudaStream_t stream) {
  Widths all{};
  for (int stage = 0; stage < num_stages; ++stage) all.of[stage] = widths[stage];
  trace_kernel<<<blocks_for(num_keys, kThreads), kThreads, 0, stream>>>(
      num_keys, num_stages, all, choices, choices_stride, codes, stride);
}

}  // namespace commvq::cuda::key_learner
