#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#include "commvq/core/error.hpp"
#include "commvq/core/float16.hpp"

#include <ucontext.h>

/// Runs CUDA kernels on the host, for tests where there is no GPU: every thread of a block is a
/// fiber, which gives way to the others where the warp or the block must come together. Blocks run
/// one after the other. Of the language it has what the kernels of `append` use. Asynchronous
/// copies happen as late as the kernel's waits allow. Races are not found.
namespace simt {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Payload {
  std::uint64_t words[4] = {};
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  unsigned index = 0;
  bool done = false;
  std::uint64_t warp_generation = 0;
  std::uint64_t block_generation = 0;
  std::deque<std::vector<Copy>> copies;  // groups; the last one is open
};

struct Warp {
  std::uint64_t generation = 0;
  int arrived = 0, live = 0;
  Payload payloads[2][32];
};

struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::uint64_t block_generation = 0;
  unsigned block_arrived = 0, live = 0;
  Thread* current = nullptr;
  ucontext_t scheduler;
  std::function<void()> body;
};

inline Machine machine;

inline void give_way() {
  Thread* const self = machine.current;
  swapcontext(&self->context, &machine.scheduler);
}

inline Warp& warp() {
  return machine.warps[machine.current->index / 32];
}
inline int lane() {
  return static_cast<int>(machine.current->index % 32);
}

/// All live lanes of the warp bring a payload; returns all of them.
inline const Payload* exchange(const Payload& mine) {
  Warp& w = warp();
  const std::uint64_t generation = machine.current->warp_generation++;
  Payload* const buffer = w.payloads[generation % 2];
  buffer[lane()] = mine;
  if (++w.arrived == w.live) {
    w.arrived = 0;
    ++w.generation;
  }
  while (w.generation <= generation) give_way();
  return buffer;
}

template <class T>
T exchange_value(T value, int from) {
  static_assert(sizeof(T) <= 8);
  Payload mine;
  std::memcpy(mine.words, &value, sizeof(T));
  const Payload* const all = exchange(mine);
  T result;
  std::memcpy(&result, all[from].words, sizeof(T));
  return result;
}

inline void block_barrier() {
  const std::uint64_t generation = machine.current->block_generation++;
  if (++machine.block_arrived == machine.live) {
    machine.block_arrived = 0;
    ++machine.block_generation;
  }
  while (machine.block_generation <= generation) give_way();
}

inline void finish_copies(std::size_t pending) {
  auto& groups = machine.current->copies;
  while (groups.size() > pending) {
    for (const Copy& copy : groups.front()) {
      if (copy.valid)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    groups.pop_front();
  }
}

}  // namespace simt

inline simt::Dim threadIdx, blockIdx;

namespace simt {

inline void run_thread() {
  machine.body();
  Thread* const self = machine.current;
  self->done = true;
  --machine.live;
  --warp().live;
  if (machine.live > 0 && machine.block_arrived == machine.live) {
    machine.block_arrived = 0;
    ++machine.block_generation;
  }
  swapcontext(&self->context, &machine.scheduler);
}

/// Runs `body`, a call of the kernel, for every thread of the grid.
inline void launch(Dim grid, unsigned num_threads, std::function<void()> body) {
  machine.body = std::move(body);
  machine.threads.resize(num_threads);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        machine.warps.assign((num_threads + 31) / 32, Warp{});
        machine.live = num_threads;
        machine.block_arrived = 0;
        machine.block_generation = 0;
        for (unsigned i = 0; i < num_threads; ++i) {
          auto& thread = machine.threads[i];
          if (!thread) thread = std::make_unique<Thread>();
          thread->stack.resize(128 * 1024);
          thread->index = i;
          thread->done = false;
          thread->warp_generation = thread->block_generation = 0;
          thread->copies.clear();
          ++machine.warps[i / 32].live;
          getcontext(&thread->context);
          thread->context.uc_stack.ss_sp = thread->stack.data();
          thread->context.uc_stack.ss_size = thread->stack.size();
          thread->context.uc_link = nullptr;
          makecontext(&thread->context, run_thread, 0);
        }
        while (machine.live > 0)
          for (auto& thread : machine.threads) {
            if (thread->done) continue;
            machine.current = thread.get();
            threadIdx = {thread->index, 0, 0};
            swapcontext(&machine.scheduler, &thread->context);
          }
      }
}

}  // namespace simt

// NOLINTBEGIN: the names are CUDA's.
#define __device__
#define __host__
#define __global__ inline
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

template <class T>
T __ldg(const T* at) {
  return *at;
}
inline std::uint32_t __float_as_uint(float value) {
  return std::bit_cast<std::uint32_t>(value);
}
inline float __uint_as_float(std::uint32_t bits) {
  return std::bit_cast<float>(bits);
}
inline int __float2int_rn(float x) {
  return static_cast<int>(std::nearbyint(x));
}
inline int __ffs(unsigned bits) {
  return bits == 0 ? 0 : std::countr_zero(bits) + 1;
}
inline int __popc(unsigned bits) {
  return std::popcount(bits);
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline void __syncthreads() {
  simt::block_barrier();
}
inline void __syncwarp() {
  simt::exchange({});
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return simt::exchange_value(value, from);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return simt::exchange_value(value, simt::lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  return simt::exchange_value(value, simt::lane() < delta ? simt::lane() : simt::lane() - delta);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  return simt::exchange_value(value,
                              simt::lane() + delta > 31 ? simt::lane() : simt::lane() + delta);
}
inline std::uint32_t __reduce_min_sync(unsigned, std::uint32_t value) {
  simt::Payload mine;
  mine.words[0] = value;
  const simt::Payload* const all = simt::exchange(mine);
  for (int i = 0; i < 32; ++i) value = min(value, static_cast<std::uint32_t>(all[i].words[0]));
  return value;
}
inline std::uint32_t __reduce_max_sync(unsigned mask, std::uint32_t value) {
  return ~__reduce_min_sync(mask, ~value);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  simt::Payload mine;
  mine.words[0] = value;
  const simt::Payload* const all = simt::exchange(mine);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= static_cast<unsigned>(all[i].words[0]) << i;
  return result;
}
inline bool __all_sync(unsigned mask, bool value) {
  return __ballot_sync(mask, value) == ~0u;
}
template <class T>
T atomicXor(T* at, T value) {
  const T old = *at;
  *at = old ^ value;
  return old;
}
// NOLINTEND

#define COMMVQ_APPEND_INSTRUCTIONS_CUH  // stands in for instructions.cuh
#define COMMVQ_BULK_COPY_CUH            // and for bulk_copy.cuh

namespace commvq::cuda {

/// A barrier on which one thread arrives, and which counts one copy, done at once.
class Barrier {
 public:
  explicit Barrier(std::uint64_t* memory) : phases_(memory) {}
  void init(int) const { *phases_ = 0; }
  void arrive_and_expect(int) const {}
  void wait(int parity) const {
    while (static_cast<int>(*phases_ % 2) == parity) simt::give_way();
  }
  void copied() const { ++*phases_; }

 private:
  std::uint64_t* phases_;
};
inline void publish_barriers() {}
inline void copy_bytes(void* to, const void* from, int bytes, const Barrier& barrier) {
  std::memcpy(to, from, static_cast<std::size_t>(bytes));
  barrier.copied();
}

/// Dynamic shared memory of the block that runs.
alignas(1024) inline unsigned char shared[256 * 1024];

namespace append_instructions {

inline std::uint16_t to_half(float value) {
  return to_fp16(value);
}
inline float from_half(std::uint16_t bits) {
  return from_fp16(bits);
}

inline constexpr bool kHasPackedIntegers = true;
/// choose(a + b, c) of pairs of 16-bit integers.
template <class Choose>
std::uint32_t add_pairs(std::uint32_t a, std::uint32_t b, std::uint32_t c, Choose choose) {
  std::uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto number = [&](std::uint32_t pair) {
      return static_cast<std::int16_t>(pair >> shift);
    };
    const auto sum = static_cast<std::int16_t>(number(a) + number(b));
    result |= static_cast<std::uint32_t>(static_cast<std::uint16_t>(choose(sum, number(c))))
              << shift;
  }
  return result;
}
inline std::uint32_t add_min_pairs(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  return add_pairs(a, b, c, min<std::int16_t>);
}
inline std::uint32_t add_max_pairs(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  return add_pairs(a, b, c, max<std::int16_t>);
}

inline float fast_exp2(float x) {
  return std::exp2(x);
}
inline float fast_reciprocal(float x) {
  return 1 / x;
}

inline void copy_async_16(void* to, const void* from, bool valid) {
  auto& groups = simt::machine.current->copies;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({to, from, valid});
}
inline void commit_copies() {
  auto& groups = simt::machine.current->copies;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}
template <int kPending>
void wait_for_copies() {
  simt::finish_copies(kPending + 1);  // the open one
}

inline void load_matrices(std::uint32_t (&to)[4], const void* shared_row) {
  simt::Payload mine;
  mine.words[0] = reinterpret_cast<std::uintptr_t>(shared_row);
  const simt::Payload* const all = simt::exchange(mine);
  const int lane = simt::lane();
  for (int i = 0; i < 4; ++i)
    std::memcpy(&to[i],
                reinterpret_cast<const char*>(all[i * 8 + lane / 4].words[0]) + lane % 4 * 4, 4);
}

inline void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                         std::uint32_t b1) {
  simt::Payload mine;
  const std::uint32_t operands[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(mine.words, operands, sizeof operands);
  const simt::Payload* const all = simt::exchange(mine);
  const auto number = [&](int lane, int word, int half) {
    std::uint32_t bits[8];
    std::memcpy(bits, all[lane].words, sizeof bits);
    return from_fp16(static_cast<std::uint16_t>(bits[word] >> (16 * half)));
  };
  const int lane = simt::lane();
  for (int i = 0; i < 4; ++i) {
    const int column = lane % 4 * 2 + i % 2;
    double sum = 0;
    for (int k = 0; k < 16; ++k)
      sum += double{number(lane / 4 * 4 + k % 8 / 2, i / 2 + k / 8 * 2, k % 2)} *
             number(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    c[i] = static_cast<float>(c[i] + sum);
  }
}

// Warpgroups: products at once, by each of the warps.
inline constexpr bool kHasWarpgroups = true;
inline void begin_warpgroup_products() {}
inline void commit_warpgroup_products() {}
template <int kCount>
void settle_sums(float (&)[kCount][4]) {}
template <int kCount>
void finish_warpgroup_products(float (&)[kCount][4]) {}
inline void compute_no_sooner(bool never) {
  require(!never, "a branch that must not be taken was");
}

inline std::uint64_t operand_descriptor(const void* at) {
  return reinterpret_cast<std::uintptr_t>(at) >> 4;
}
inline std::uint64_t advanced(std::uint64_t descriptor, int bytes) {
  return descriptor + static_cast<std::uint64_t>(bytes >> 4);
}
template <int kSign, int kTransposed>
void warpgroup_multiply_add(float (&c)[8][4], const std::uint32_t (&a)[4], std::uint64_t b) {
  simt::Payload mine;
  std::memcpy(mine.words, a, sizeof a);
  const simt::Payload* const all = simt::exchange(mine);
  const int lane = simt::lane();
  for (int i = 0; i < 4; ++i)
    for (int n = 0; n < 8; ++n) {
      const int column = n * 8 + lane % 4 * 2 + i % 2;
      double sum = 0;
      for (int k = 0; k < 16; ++k) {
        std::uint32_t words[8];
        std::memcpy(words, all[lane / 4 * 4 + k % 8 / 2].words, sizeof words);
        const auto row = static_cast<std::uint16_t>(words[i / 2 + k / 8 * 2] >> (k % 2 * 16));
        const int offset = kTransposed != 0 ? k * 128 + column * 2 : column * 128 + k * 2;
        const std::uintptr_t at = (b << 4) + static_cast<std::uintptr_t>(offset);
        std::uint16_t number;  // 16-byte pieces are swizzled
        std::memcpy(&number, reinterpret_cast<const void*>(at ^ (at >> 7 & 7) << 4), 2);
        sum += double{from_fp16(row)} * from_fp16(number);
      }
      c[n][i] = static_cast<float>(c[n][i] + kSign * sum);
    }
}

}  // namespace append_instructions
}  // namespace commvq::cuda
