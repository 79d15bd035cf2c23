#include <cfloat>

#include "common/memory.cuh"
#include "common/sums.cuh"
#include "kernels.hpp"

// The E step. A centre's score is -|x - Z_0[a] - Z_1[b]|^2 + |x|^2 =
//     (2 <x, Z_0[a]> - |Z_0[a]|^2)   "term of a"
//   + (2 <x, Z_1[b]> - |Z_1[b]|^2)   "term of b"
//   - 2 <Z_0[a], Z_1[b]>             "cross term".
// Scores are always added up in the order a + (b - cross), so that none exceeds the largest, however
// low the temperature. A warp does one residual at a time. A lane owns every 32nd a and goes through all b, or the other
// way round, so that sums over one of them need no exchange.

namespace commvq::cuda::key_learner {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr float kLog2E = 1.44269504f;

__device__ float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

__global__ void __launch_bounds__(kThreads)
    make_residuals_kernel(HeadBooks books, int group, int stage, Index num_keys, const float* keys,
                          const std::uint16_t* codes, float* residuals, float* squared_norms) {
  const int lane = threadIdx.x % 32;
  const Index key = Index{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (key >= num_keys) return;
  const int g = books.width / 2, head_dim = books.head_dim();
  const std::uint16_t* const code =
      codes + key * books.num_codes() + 2 * group * books.num_stages;
  const float* const rows = books.rows + Index{2} * group * books.num_stages *
                                             books.codebook_size * books.width;
  float square = 0;
  for (int i = lane; i < books.width; i += 32) {
    const int channel = (i < g ? 0 : head_dim / 2 - g) + group * g + i;
    float x = keys[key * head_dim + channel];
    for (int k = 0; k < 2 * stage; ++k)
      x -= rows[(Index{k} * books.codebook_size + code[k]) * books.width + i];
    residuals[key * books.width + i] = x;
    square += x * x;
  }
  square = warp_sum(square);
  if (lane == 0) squared_norms[key] = square;
}

/// Terms of a and b of one residual, [2 Nc], from its inner products with the rows.
__device__ void read_terms(const StageBooks& books, const float* products, int lane, float* terms) {
  for (int i = lane; i < 2 * books.codebook_size; i += 32)
    terms[i] = 2 * products[i] - books.squared_norms[i];
  __syncwarp();
}

/// Beyond 1e30 an assignment is hard, and infinity times a difference of zero would be NaN.
__device__ float scale_of(const Assignment& work) {
  return fminf(work.inverse_temperature, 1e30f) * kLog2E;
}

/// The largest score of all centres.
__device__ float largest_score(const StageBooks& books, const float* terms, int lane) {
  const int size = books.codebook_size;
  const float* const by_b = books.cross_terms + Index{size} * size;
  float largest = -FLT_MAX;
  for (int a = lane; a < size; a += 32) {
    float best = -FLT_MAX;
    for (int b = 0; b < size; ++b) best = fmaxf(best, terms[size + b] - by_b[b * size + a]);
    largest = fmaxf(largest, terms[a] + best);
  }
  return warp_max(largest);
}

/// Largest score, log2 of the sum of weights, and the margins p(A | x), p(B | x).
__global__ void __launch_bounds__(kThreads) margins_kernel(StageBooks books, Assignment work) {
  extern __shared__ float shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int size = books.codebook_size;
  float* const terms = shared + warp * 2 * size;
  const float* const by_b = books.cross_terms + Index{size} * size;
  const float scale = scale_of(work);
  for (Index key = Index{blockIdx.x} * kWarps + warp; key < work.num_keys;
       key += Index{gridDim.x} * kWarps) {
    float* const margins = work.products + key * 2 * size;
    read_terms(books, margins, lane, terms);
    const float largest = largest_score(books, terms, lane);
    float total = 0;
    for (int a = lane; a < size; a += 32) {
      float sum = 0;
      for (int b = 0; b < size; ++b)
        sum += exp2_approx(scale * (terms[a] + (terms[size + b] - by_b[b * size + a]) - largest));
      margins[a] = sum;
      total += sum;
    }
    total = warp_sum(total);
    const float factor = 1.0f / total;
    for (int a = lane; a < size; a += 32) margins[a] *= factor;
    for (int b = lane; b < size; b += 32) {
      float sum = 0;
      for (int a = 0; a < size; ++a)
        sum += exp2_approx(
            scale * (terms[a] + (terms[size + b] - books.cross_terms[a * size + b]) - largest));
      margins[size + b] = sum * factor;
    }
    for (int i = lane; i < 2 * size; i += 32) work.terms[key * 2 * size + i] = terms[i];
    if (lane == 0) {
      work.best_scores[key] = largest;
      work.least_errors[key] = fmaxf(0.0f, work.squared_norms[key] - largest);
      work.log2_totals[key] = log2f(total);
    }
    __syncwarp();
  }
}

constexpr int kTile = 64;       ///< a and b of one block's w_AB; a thread has 4 x 4 of them
constexpr int kStepKeys = 16;

/// Sums of p(A, B | x) over a chunk of residuals, and of their errors.
__global__ void __launch_bounds__(kThreads) pair_weights_kernel(StageBooks books, Assignment work) {
  __shared__ __align__(16) float terms[kStepKeys][2 * kTile];
  __shared__ float log2_totals[kStepKeys], best_scores[kStepKeys];
  const int size = books.codebook_size, thread = threadIdx.x;
  const int first_a = blockIdx.y * kTile, first_b = blockIdx.z * kTile;
  const int a = thread / 16 * 4, b = thread % 16 * 4;
  const Index first = Index{blockIdx.x} * kChunkKeys;
  const int count = static_cast<int>(min(Index{kChunkKeys}, work.num_keys - first));
  const float scale = scale_of(work);
  float cross[4][4], sums[4][4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      cross[i][j] = first_a + a + i < size && first_b + b + j < size
                        ? books.cross_terms[Index{first_a + a + i} * size + first_b + b + j]
                        : 0.0f;  // not stored
  for (int step = 0; step < count; step += kStepKeys) {
    const int keys = min(kStepKeys, count - step);
    __syncthreads();
    for (int i = thread; i < keys * 2 * kTile; i += kThreads) {
      const int key = i / (2 * kTile), column = i % (2 * kTile);
      const int of_book = column < kTile ? first_a + column : first_b + column - kTile;
      terms[key][column] =
          of_book < size ? work.terms[(first + step + key) * 2 * size +
                                      (column < kTile ? 0 : size) + of_book]
                         : 0.0f;
    }
    if (thread < keys) {
      log2_totals[thread] = work.log2_totals[first + step + thread];
      best_scores[thread] = work.best_scores[first + step + thread];
    }
    __syncthreads();
    for (int key = 0; key < keys; ++key) {
      const float4 of_a = *reinterpret_cast<const float4*>(&terms[key][a]);
      const float4 of_b = *reinterpret_cast<const float4*>(&terms[key][kTile + b]);
      const float as[4] = {of_a.x, of_a.y, of_a.z, of_a.w};
      const float bs[4] = {of_b.x, of_b.y, of_b.z, of_b.w};
      const float offset = log2_totals[key], best = best_scores[key];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          sums[i][j] += exp2_approx(scale * (as[i] + (bs[j] - cross[i][j]) - best) - offset);
    }
  }
  float* const out = work.chunk_weights + Index{blockIdx.x} * size * size;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (first_a + a + i < size && first_b + b + j < size)
        out[Index{first_a + a + i} * size + first_b + b + j] = sums[i][j];
  if (blockIdx.y == 0 && blockIdx.z == 0 && thread == 0) {
    double error = 0;
    for (int key = 0; key < count; ++key) error += work.least_errors[first + key];
    work.chunk_errors[blockIdx.x] = error;
  }
}

/// sums [size] = the chunks' [chunks][size] added in order.
__global__ void add_chunks_kernel(const float* chunks, Index num_chunks, Index size, double* sums) {
  const Index i = Index{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= size) return;
  double sum = 0;
  for (Index chunk = 0; chunk < num_chunks; ++chunk) sum += chunks[chunk * size + i];
  sums[i] = sum;
}

__global__ void __launch_bounds__(kThreads)
    nearest_kernel(StageBooks books, Index num_keys, const float* products, std::uint16_t* codes,
                   Index stride) {
  extern __shared__ float shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int size = books.codebook_size;
  float* const terms = shared + warp * 2 * size;
  const Index key = Index{blockIdx.x} * kWarps + warp;
  if (key >= num_keys) return;
  read_terms(books, products + key * 2 * size, lane, terms);
  const float largest = largest_score(books, terms, lane);
  // The first (a, b) that has it.
  const float* const by_b = books.cross_terms + Index{size} * size;
  int nearest = size * size;
  for (int a = lane; a < size; a += 32)
    for (int b = 0; b < size; ++b)
      if (terms[a] + (terms[size + b] - by_b[b * size + a]) == largest) {
        nearest = min(nearest, a * size + b);
        break;
      }
  nearest = __reduce_min_sync(0xffffffffu, static_cast<unsigned>(nearest));
  if (lane == 0) {
    codes[key * stride] = static_cast<std::uint16_t>(nearest / size);
    codes[key * stride + 1] = static_cast<std::uint16_t>(nearest % size);
  }
}

unsigned warps_for(Index num_keys) {
  return static_cast<unsigned>((num_keys + kWarps - 1) / kWarps);
}
std::size_t terms_bytes(const StageBooks& books) {
  return sizeof(float) * kWarps * 2 * static_cast<std::size_t>(books.codebook_size);
}

}  // namespace

void make_residuals(const HeadBooks& books, int group, int stage, Index num_keys,
                    const float* keys, const std::uint16_t* codes, float* residuals,
                    float* squared_norms, cudaStream_t stream) {
  make_residuals_kernel<<<warps_for(num_keys), kThreads, 0, stream>>>(
      books, group, stage, num_keys, keys, codes, residuals, squared_norms);
}

void soft_assign(const StageBooks& books, const Assignment& assignment, cudaStream_t stream) {
  const auto chunks = static_cast<unsigned>(num_chunks(assignment.num_keys));
  const auto tiles = static_cast<unsigned>((books.codebook_size + kTile - 1) / kTile);
  margins_kernel<<<warps_for(assignment.num_keys), kThreads, terms_bytes(books), stream>>>(
      books, assignment);
  pair_weights_kernel<<<dim3(chunks, tiles, tiles), kThreads, 0, stream>>>(books, assignment);
  const Index size = Index{books.codebook_size} * books.codebook_size;
  add_chunks_kernel<<<static_cast<unsigned>((size + kThreads - 1) / kThreads), kThreads, 0,
                      stream>>>(assignment.chunk_weights, chunks, size, assignment.pair_weights);
}

void assign_nearest(const StageBooks& books, Index num_keys, const float* products,
                    std::uint16_t* codes, Index stride, cudaStream_t stream) {
  nearest_kernel<<<warps_for(num_keys), kThreads, terms_bytes(books), stream>>>(
      books, num_keys, products, codes, stride);
}

}  // namespace commvq::cuda::key_learner
