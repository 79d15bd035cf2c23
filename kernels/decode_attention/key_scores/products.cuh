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

/// A lane's operand of sixteen pairs, 16 part and on, of the queries of a tile, for a half of a
/// step whose fragments begin at `queries`.
template <int kWidth>
__device__ __forceinline__ uint4 query_pairs(const uint4* queries, int tile, int part) {
  return queries[tile * Shared<kWidth>::kTileVectors + part * 32 + threadIdx.x % 32];
}

/// Turns pairs 8k and on of the keys and adds their products with the queries of kUsed tiles, of
/// which `queries` are sixteen pairs.
template <int kTiles, int kUsed, int kWidth>
__device__ __forceinline__ void multiply(const PairKeys& keys, int k,
                                         const TokenTurns<kWidth>& turns,
                                         const uint4 (&queries)[kTiles],
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
    const uint4 query = queries[tile];
    mma_16x8x16(products[tile], turned[0], turned[1], turned[2], turned[3],
                k % 2 == 0 ? query.x : query.z, k % 2 == 0 ? query.y : query.w);
  }
}

/// What stands for zero, of a lane's pairs 8k + 2q and the next.
template <int kWidth>
__device__ __forceinline__ uint2 zero_of(const Shared<kWidth>& shared, int k) {
  // Those of two k at once.
  const uint4 two = *reinterpret_cast<const uint4*>(shared.zero_points[k / 2][threadIdx.x % 4]);
  return k % 2 == 0 ? make_uint2(two.x, two.y) : make_uint2(two.z, two.w);
}

/// The same of all pairs, from sums of rows of 8 bits.
template <int kTiles, int kWidth>
__device__ __forceinline__ void multiply_sums(const ByteRowSums<kWidth>& sums,
                                              const Shared<kWidth>& shared,
                                              const TokenTurns<kWidth>& turns, const uint4* queries,
                                              Products<kTiles>& products) {
#pragma unroll
  for (int part = 0; part < kWidth / 16; ++part) {
    uint4 of_tiles[kTiles];
    for (int tile = 0; tile < kTiles; ++tile)
      of_tiles[tile] = query_pairs<kWidth>(queries, tile, part);
    for (int k = 2 * part; k < 2 * part + 2; ++k)
      multiply<kTiles, kTiles>(sums.keys(k, zero_of(shared, k)), k, turns, of_tiles, products);
  }
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
    uint4 of_tiles[kTiles];
    of_tiles[0] = query_pairs<64>(queries, 0, part);
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
      for (int i = 0; i < 2; ++i) multiply_pairs(keys[i], 2 * part + i, turns, of_tiles, products);
    };
    if (num_rows <= Config::kTileRows) {
      multiply_part(multiply<kTiles, 1, 64>);
    } else if constexpr (kTiles > 1) {
      for (int tile = 1; tile < kTiles; ++tile)
        of_tiles[tile] = query_pairs<64>(queries, tile, part);
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
