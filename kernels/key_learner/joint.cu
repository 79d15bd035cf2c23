#include "common/sums.cuh"
#include "kernels.hpp"

namespace commvq::cuda::key_learner {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

unsigned blocks_for(Index count, Index per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

/// Where planar number i of a group's row lies in a head's key.
__device__ int channel_of(const HeadBooks& books, int group, int i) {
  const int g = books.width / 2;
  return (i < g ? 0 : books.head_dim() / 2 - g) + group * g + i;
}

/// A warp a key.
__global__ void __launch_bounds__(kThreads)
    errors_kernel(HeadBooks books, Index num_keys, const float* keys, const std::uint16_t* codes,
                  double* errors) {
  const int lane = threadIdx.x % 32;
  const Index key = Index{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (key >= num_keys) return;
  const int num_books = 2 * books.num_stages;
  double sum = 0;
  for (int group = 0; group < books.num_groups; ++group) {
    const std::uint16_t* const code = codes + key * books.num_codes() + group * num_books;
    const float* const rows =
        books.rows + Index{group} * num_books * books.codebook_size * books.width;
    for (int i = lane; i < books.width; i += 32) {
      float decoded = 0;
      for (int k = 0; k < num_books; ++k)
        decoded += rows[(Index{k} * books.codebook_size + code[k]) * books.width + i];
      const double difference =
          static_cast<double>(keys[key * books.head_dim() + channel_of(books, group, i)]) - decoded;
      sum += difference * difference;
    }
  }
  sum = warp_sum(sum);
  if (lane == 0) errors[key] = sum;
}

__global__ void keep_better_kernel(Index num_keys, int num_codes, const std::uint16_t* new_codes,
                                   const double* new_errors, std::uint16_t* codes, double* errors) {
  const Index key = Index{blockIdx.x} * blockDim.x + threadIdx.x;
  if (key >= num_keys || !(new_errors[key] < errors[key])) return;
  errors[key] = new_errors[key];
  for (int k = 0; k < num_codes; ++k) codes[key * num_codes + k] = new_codes[key * num_codes + k];
}

/// A warp a key. Sums of integers do not depend on their order.
__global__ void __launch_bounds__(kThreads)
    counts_kernel(HeadBooks books, int group, Index num_keys, const std::uint16_t* codes,
                  int* counts) {
  const int lane = threadIdx.x % 32;
  const Index key = Index{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (key >= num_keys) return;
  const int num_books = 2 * books.num_stages;
  const Index num_rows = Index{num_books} * books.codebook_size;
  const std::uint16_t* const code = codes + key * books.num_codes() + group * num_books;
  for (int pair = lane; pair < num_books * num_books; pair += 32) {
    const int k = pair / num_books, other = pair % num_books;
    atomicAdd(counts + (Index{k} * books.codebook_size + code[k]) * num_rows +
                  Index{other} * books.codebook_size + code[other],
              1);
  }
}

/// A block a book and chunk of keys, a thread a column: no two threads add to the same number.
__global__ void chunk_sums_kernel(HeadBooks books, int group, Index num_keys, const float* keys,
                                  const std::uint16_t* codes, float* chunk_sums) {
  extern __shared__ float sums[];  // [codebook_size][width]
  const int book = blockIdx.x, chunk = blockIdx.y, column = threadIdx.x;
  const int size = books.codebook_size * books.width;
  for (int i = column; i < size; i += blockDim.x) sums[i] = 0;
  __syncthreads();
  const Index first = num_keys * chunk / kSumChunks, end = num_keys * (chunk + 1) / kSumChunks;
  const std::uint16_t* const code = codes + group * 2 * books.num_stages + book;
  for (int i = column; i < books.width; i += blockDim.x) {
    const int channel = channel_of(books, group, i);
#pragma unroll 4
    for (Index key = first; key < end; ++key)
      sums[code[key * books.num_codes()] * books.width + i] +=
          keys[key * books.head_dim() + channel];
  }
  __syncthreads();
  float* const out = chunk_sums + (Index{chunk} * 2 * books.num_stages + book) * size;
  for (int i = column; i < size; i += blockDim.x) out[i] = sums[i];
}

__global__ void add_sums_kernel(const float* chunk_sums, Index size, double* sums) {
  const Index i = Index{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= size) return;
  double sum = 0;
  for (int chunk = 0; chunk < kSumChunks; ++chunk) sum += chunk_sums[chunk * size + i];
  sums[i] = sum;
}

}  // namespace

void squared_errors(const HeadBooks& books, Index num_keys, const float* keys,
                    const std::uint16_t* codes, double* errors, cudaStream_t stream) {
  errors_kernel<<<blocks_for(num_keys, kWarps), kThreads, 0, stream>>>(books, num_keys, keys, codes,
                                                                       errors);
}

void keep_better(Index num_keys, int num_codes, const std::uint16_t* new_codes,
                 const double* new_errors, std::uint16_t* codes, double* errors,
                 cudaStream_t stream) {
  keep_better_kernel<<<blocks_for(num_keys, kThreads), kThreads, 0, stream>>>(
      num_keys, num_codes, new_codes, new_errors, codes, errors);
}

bool count_occurrences(const HeadBooks& books, int group, Index num_keys, const float* keys,
                       const std::uint16_t* codes, int* counts, float* chunk_sums, double* sums,
                       cudaStream_t stream) {
  const int num_books = 2 * books.num_stages;
  const Index num_rows = Index{num_books} * books.codebook_size;
  cudaMemsetAsync(counts, 0, sizeof(int) * static_cast<std::size_t>(num_rows * num_rows), stream);
  counts_kernel<<<blocks_for(num_keys, kWarps), kThreads, 0, stream>>>(books, group, num_keys,
                                                                       codes, counts);
  const int bytes = 4 * books.codebook_size * books.width;
  if (cudaFuncSetAttribute(chunk_sums_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) !=
      cudaSuccess) {
    cudaGetLastError();  // the refusal is the answer
    return false;
  }
  const auto threads = static_cast<unsigned>(books.width < 1024 ? books.width : 1024);
  chunk_sums_kernel<<<dim3(static_cast<unsigned>(num_books), kSumChunks), threads,
                      static_cast<std::size_t>(bytes), stream>>>(books, group, num_keys, keys,
                                                                 codes, chunk_sums);
  const Index size = num_rows * books.width;
  add_sums_kernel<<<blocks_for(size, kThreads), kThreads, 0, stream>>>(chunk_sums, size, sums);
  return true;
}

}  // namespace commvq::cuda::key_learner
