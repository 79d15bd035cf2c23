#pragma once

#include <cstdint>

#include "common/mma.cuh"
#include "decode_attention/key_scores/byte_rows.cuh"
#include "decode_attention/key_scores/narrow_rows.cuh"
#include "decode_attention/key_scores/pair_keys.cuh"
#include "decode_attention/key_scores/shared.cuh"

/// Sums of rows, turned and multiplied with the queries.
namespace commvq::cuda::key_scores {

/// Cosines and sines of a thread's pairs for its first token of a step.
template <int kWidth>
struct TokenTurns {
  __half2 cosine[kWidth / 8];
  __half2 sine[kWidth / 8];

  /// `offset` is the token's place in the step.
  __device__ __forceinline__ TokenTurns(const KeySlice& slice, int offset) {
    const auto* const table = reinterpret_cast<const uint2*>(slice.token_turns);
#pragma unroll
    for (int k = 0; k < kWidth / 8; ++k) {
      const uint2 turn = table[(offset * (kWidth / 8) + k) * 4 + threadIdx.x % 4];
      cosine[k] = as_half2(turn.x);
      sine[k] = as_half2(turn.y);
    }
  }
};

/// Products of sixteen of a warp's keys with the queries, [tile][lane's elements].
template <int kTiles>
using Products = float[kTiles][4];

/// Turns pairs 8k and on of the keys and adds their products with the queries of kUsed tiles for a
/// half of a step, whose fragments begin at `queries`.
template <int kTiles, int kUsed, int kWidth>
__device__ __forceinline__ void multiply(const PairKeys& keys, int k,
                                         const TokenTurns<kWidth>& turns, const uint4* queries,
                                         Products<kTiles>& products) {
  const __half2 c = turns.cosine[k], s = turns.sine[k];
  std::uint32_t turned[4];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    turned[t] = as_bits(__hfma2(keys.real[t], c, __hneg2(__hmul2(keys.imag[t], s))));
    turned[2 + t] = as_bits(__hfma2(keys.real[t], s, __hmul2(keys.imag[t], c)));
  }
#pragma unroll
  for (int tile = 0; tile < kUsed; ++tile) {
    const uint4* const fragments =
        queries + tile * Shared<kWidth>::kTileVectors + k / 2 * 32 + threadIdx.x % 32;
    const uint2 query = reinterpret_cast<const uint2*>(fragments)[k % 2];
    mma_16x8x16(products[tile], turned[0], turned[1], turned[2], turned[3], query.x, query.y);
  }
}

/// What stands for zero, of a lane's pairs 8k + 2q and the next.
template <int kWidth>
__device__ __forceinline__ uint2 zero_of(const Shared<kWidth>& shared, int k) {
  return shared.zero_points[k * 4 + threadIdx.x % 4];
}

/// The same of all pairs, from sums of rows of 8 bits.
template <int kTiles, int kWidth>
__device__ __forceinline__ void multiply_sums(const ByteRowSums<kWidth>& sums,
                                              const Shared<kWidth>& shared,
                                              const TokenTurns<kWidth>& turns, const uint4* queries,
                                              Products<kTiles>& products) {
#pragma unroll
  for (int k = 0; k < kWidth / 8; ++k)
    multiply<kTiles, kTiles>(sums.keys(k, zero_of(shared, k)), k, turns, queries, products);
}

/// The same from rows of 4 bits, sixteen pairs at a time; with kReadAhead the next ones' first rows
/// are read before these pairs are multiplied.
template <bool kReadAhead, int kTiles, int kGroups>
__device__ __forceinline__ void multiply_rows(const NarrowRows<kGroups>& rows,
                                              const Shared<64>& shared, const TokenTurns<64>& turns,
                                              const uint4* queries, int num_rows,
                                              Products<kTiles>& products) {
  const LaneWeights weights(shared.line_weights);
  uint4 firsts[2];
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    PairKeys keys[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      if (part == 0 || !kReadAhead) firsts[t] = rows.first(t, 16 * part);
      const NarrowSums sums = rows.sums(weights, t, 16 * part, firsts[t]);
      if (kReadAhead && part < 3) firsts[t] = rows.first(t, 16 * (part + 1));
#pragma unroll
      for (int i = 0; i < 2; ++i)
        sums.get(i, zero_of(shared, 2 * part + i), keys[i].real[t], keys[i].imag[t]);
    }
    // Without a branch the compiler begins the next part's sums too early, and spills.
    const auto multiply_part = [&](auto multiply_pairs) {
      for (int i = 0; i < 2; ++i) multiply_pairs(keys[i], 2 * part + i, turns, queries, products);
    };
    if (num_rows <= Config::kTileRows) {
      multiply_part(multiply<kTiles, 1, 64>);
    } else {
      multiply_part(multiply<kTiles, kTiles, 64>);
    }
  }
}

/// Products of a lane's row with its tokens, [tile][token].
template <int kTiles>
using LaneProducts = float[kTiles][4];

/// Those of tokens `half` and `half` + 2 from the products of a half, of which a lane has two rows
/// of one token.
template <int kTiles>
__device__ __forceinline__ void gather(const Products<kTiles>& products, int half,
                                       LaneProducts<kTiles>& gathered) {
  const bool is_second = threadIdx.x % 4 >= 2;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const float(&of)[4] = products[tile];
    const float kept = is_second ? of[3] : of[0];
    const float other = __shfl_xor_sync(~0u, is_second ? of[2] : of[1], 2);
    gathered[tile][half] = is_second ? other : kept;
    gathered[tile][half + 2] = is_second ? kept : other;
  }
}

}  // namespace commvq::cuda::key_scores
