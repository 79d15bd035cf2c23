#pragma once

#include "common/bulk_copy.cuh"
#include "load_tokens.cuh"
#include "warpgroup_search.cuh"
#include "write_keys.cuh"

namespace commvq::cuda {

// The beam search by warpgroups, beams of up to 8. A warp has two tokens: row g is candidate g of
// the first, row g + 8 of the second. As in the greedy search a stage finds for each row and b the
// least error over a in integers. What may be kept has an error of at most about the limit that as
// many columns (candidate, b) reach as are kept; it is found column by column, compared in fp32,
// and merged into what the token keeps so far.

/// Shared memory of a block, offsets in bytes.
template <bool kTied>
struct BeamSearchShared {
  static constexpr int kNumTokens = kWarpgroupSearch.num_rows / kMaxSearchBeam;
  int stage;    ///< SearchStage
  int barrier;  ///< Barrier of the stage
  int terms;    ///< uint32 [rows][kSearchTermStride]: terms of a, twice each
  int history;  ///< uint32 [stages][rows]: parent << 28 | a << 14 | b
  int codes;    ///< uint16 [tokens][codes_stride]
  int codes_stride;
  int bytes;

  COMMVQ_HOST_DEVICE explicit BeamSearchShared(int num_stages) {
    codes_stride = 2 * num_stages + 1;
    stage = 0;
    barrier = stage + SearchStage<kTied>::kBytes;
    terms = barrier + 16;
    history = terms + 4 * kWarpgroupSearch.num_rows * kSearchTermStride;
    codes = history + 4 * kWarpgroupSearch.num_rows * num_stages;
    bytes = codes + 2 * kNumTokens * codes_stride;
  }
};

/// One warp's beams. `kTied` as of `SearchStage`.
template <bool kTied>
struct BeamSearch {
  const WarpgroupSearch<kTied>& search;
  int beam_width, width;  ///< candidates to be kept, and those that there are

  /// An upper bound of the `beam_width`-th least of the lanes' errors, +infinity if there are too
  /// few: from the two least of every lane.
  __device__ float bound(const float (&errors)[16], bool is_there) const {
    float least = __uint_as_float(0x7f800000u), second = least;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      second = fminf(second, fmaxf(least, errors[i]));
      least = fminf(least, errors[i]);
    }
    std::uint32_t first_bits = is_there ? ordered_bits(least) : ~0u;
    std::uint32_t second_bits = is_there ? ordered_bits(second) : ~0u;
    std::uint32_t found = 0;
    for (int rank = 0; rank < beam_width; ++rank) {
      found = __reduce_min_sync(0xffffffffu, first_bits);
      if (first_bits != found) continue;
      first_bits = second_bits;
      second_bits = ~0u;
    }
    return found == ~0u ? __uint_as_float(0x7f800000u) : from_ordered_bits(found);
  }

  /// Of the lanes' extensions the best `beam_width`, sorted, in lanes 4 i + 1; others keep none.
  __device__ SortKey sorted(SortKey key) const {
    SortKey kept = kLastKey;
    for (int rank = 0; rank < beam_width; ++rank) {
      const SortKey least = warp_least(key);
      if (key == least) key = kLastKey;
      if (search.lane == 4 * rank + 1) kept = least;
    }
    return kept;
  }
  /// The last extension that is kept.
  __device__ SortKey worst(SortKey kept) const {
    return __shfl_sync(0xffffffffu, kept, 4 * beam_width - 3);
  }

  /// The extensions that a token keeps, sorted, in lanes 4 i + 1. `error` is that of the row's
  /// candidate, `least` the least sums of integers for each b.
  __device__ SortKey extend(const SearchRows& terms, const std::uint32_t (&negated)[8],
                            const std::uint32_t (&least)[8], int part, float error,
                            float least_of_a) const {
    const int candidate = search.lane / 4;
    const bool is_there = candidate < width;
    const float unit = search.unit(), per_unit = unit > 0 ? 1 / unit : 0;
    const float base = error + least_of_a;
    float errors[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const auto sum = static_cast<std::int16_t>(least[i / 2] >> (i % 2 * 16));
      errors[i] = base + (terms.half[1][i / 2][2 * part + i % 2] + unit * static_cast<float>(sum));
    }
    const float limit = bound(errors, is_there);
    // As in `candidates_b`; errors of candidates are rounded, too.
    const float margin =
        2.01f * unit + 1e-6f * (fabsf(error) + fabsf(least_of_a) + 6.0f * kLargestCrossTerm * unit);
    float best = errors[0];
#pragma unroll
    for (int i = 1; i < 16; ++i) best = fminf(best, errors[i]);
    best = row_least(best);
    unsigned first = 0, others = 0;  // the row's best columns, and the others
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const unsigned bit = is_there && errors[i] <= limit + margin ? 1u << (i / 2 + i % 2 * 16) : 0;
      if (errors[i] > best)
        others |= bit;
      else
        first |= bit;
    }

    // Lanes 4 i + 1 keep extensions; the others of a row hold new ones until they are full.
    SortKey key = kLastKey;
    int num_new = 0;
    while (__ballot_sync(0xffffffffu, (first | others) != 0) != 0) {
      const bool is_first = __ballot_sync(0xffffffffu, first != 0) != 0;
      unsigned mask_b = is_first ? first : others;
      const int column = take_column(mask_b);
      (is_first ? first : others) = mask_b;
      const bool has_b = column < kSearchSize;
      const int b = has_b ? column : 0;
      const float of_b = search.term_of(terms.half[1], part, b);
      std::uint32_t sums[8];
      search.minus_sums(negated, b, sums);
      // What is kept already is a limit, too, once there is enough of it.
      const SortKey last = worst(key);
      const float now = last == kLastKey ? limit : fminf(limit, error_of(last));
      const float room = (now + margin - base - of_b) * per_unit;  // for a sum of integers
      const int most = __float2int_rn(fminf(fmaxf(room, -16384.0f), 3.0f * kLargestCrossTerm));
      unsigned mask_a = has_b ? search.columns_within(sums, most) : 0;
      while (__ballot_sync(0xffffffffu, mask_a != 0) != 0) {
        const int a = take_column(mask_a);
        const bool has_a = a < kSearchSize;
        const float of_a = search.term_of(terms.half[0], part, has_a ? a : 0);
        SortKey found = kLastKey;
        if (has_a) {
          const float cross = __ldg(search.cross_terms + a * kSearchSize + b);
          found = sort_key((error + of_a) + (of_b + cross), candidate, a, b);
        }
        if (__ballot_sync(0xffffffffu, found < worst(key)) == 0) continue;
        if (search.lane % 4 == (num_new == 0 ? 0 : num_new + 1)) key = found;
        if (++num_new < 3) continue;
        key = sorted(key);
        num_new = 0;
      }
    }
    return num_new == 0 ? key : sorted(key);
  }

  /// Gives every row the residual of its choice's parent.
  __device__ void inherit(SearchRows& rows, const std::uint32_t (&choices)[2]) const {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int from = candidate_of(choices[part]) % kMaxSearchBeam * 4 + search.lane % 4;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        float& number = rows.half[i / 16][i / 2 % 8][2 * part + i % 2];
        number = __shfl_sync(0xffffffffu, number, from);
      }
    }
  }
};

/// The codes of 8 tokens of one head and group: grid (blocks of tokens, heads, groups).
template <bool kTied>
__global__ void __launch_bounds__(kWarpgroupSearch.num_threads, kWarpgroupSearch.min_blocks)
    search_beam_codes([[maybe_unused]] const __grid_constant__ EncoderView encoder,
                      [[maybe_unused]] Index num_tokens, [[maybe_unused]] const float* unit_keys,
                      [[maybe_unused]] const std::uint16_t* norms,
                      [[maybe_unused]] PagedCodes pages,
                      [[maybe_unused]] const std::int64_t* slot_mapping) {
  if constexpr (append_instructions::kHasWarpgroups) {
    using Stage = SearchStage<kTied>;
    extern __shared__ __align__(1024) unsigned char shared[];
    const KeyEncoderView& keys = encoder.keys;
    const DevicePageLayout& layout = encoder.layout;
    const BeamSearchShared<kTied> at(keys.num_stages);
    const int head = static_cast<int>(blockIdx.y), group = static_cast<int>(blockIdx.z);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const Index books = (Index{head} * layout.num_groups + group) * keys.num_stages;
    const Barrier copied(reinterpret_cast<std::uint64_t*>(shared + at.barrier));
    const auto start_stage = [&](int stage) {
      if (thread != 0 || stage >= keys.num_stages) return;
      copied.arrive_and_expect(Stage::kBytes);
      copy_bytes(shared + at.stage, keys.search_stages + (books + stage) * Stage::kBytes,
                 Stage::kBytes, copied);
    };
    if (thread == 0) {
      copied.init(1);
      publish_barriers();
    }
    __syncthreads();
    start_stage(0);

    // All candidates begin as the key; only the first one counts.
    const Index first_token = Index{blockIdx.x} * BeamSearchShared<kTied>::kNumTokens + 2 * warp;
    SearchRows rows;
    float errors[2];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const Index token = min(first_token + part, num_tokens - 1);
      const float* const key = unit_keys + (token * layout.num_kv_heads + head) * layout.head_dim;
      errors[part] =
          row_sum(load_row(rows, part, key, layout.head_dim, group, keys.residual_scale));
    }

    auto* const history = reinterpret_cast<std::uint32_t*>(shared + at.history) + warp * 16;
    int width = 1;
    for (int stage = 0; stage < keys.num_stages; ++stage) {
      copied.wait(stage % 2);
      const WarpgroupSearch<kTied> search{
          shared + at.stage,
          reinterpret_cast<std::uint32_t*>(shared + at.terms) + warp * 16 * kSearchTermStride,
          keys.cross_terms + (books + stage) * kSearchSize * kSearchSize,
          keys.search_factor,
          lane,
          keys.num_stages};
      SearchRows terms;
      search.template compute_terms<8>(rows, terms);
      std::uint32_t negated[8], least[2][8], choices[2];
      float least_of_a[2];
      search.prepare(terms, least_of_a, least);
      const BeamSearch<kTied> beam{search, keys.beam_width, width};
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        search.read_negated_terms_of_a(part, negated);
        const SortKey kept =
            beam.extend(terms, negated, least[part], part, errors[part], least_of_a[part]);
        const SortKey choice = __shfl_sync(0xffffffffu, kept, lane / 4 * 4 + 1);
        errors[part] = error_of(choice);
        const auto code = static_cast<std::uint32_t>(choice);
        choices[part] = code & (7u << 28 | 63u << 14 | 63u);
        if (lane % 4 == 0)
          history[stage * kWarpgroupSearch.num_rows + part * 8 + lane / 4] = choices[part];
      }
      beam.inherit(rows, choices);
      search.take_off(choices, rows);
      width = min(keys.beam_width, width * kSearchSize * kSearchSize);
      __syncthreads();  // the stage is no longer read
      start_stage(stage + 1);
    }

    // The best candidates' paths.
    auto* const codes =
        reinterpret_cast<std::uint16_t*>(shared + at.codes) + 2 * warp * at.codes_stride;
    if (lane < 2) {
      int candidate = 0;
      for (int stage = keys.num_stages - 1; stage >= 0; --stage) {
        const std::uint32_t choice =
            history[stage * kWarpgroupSearch.num_rows + lane * 8 + candidate];
        candidate = candidate_of(choice);
        codes[lane * at.codes_stride + 2 * stage] = static_cast<std::uint16_t>(a_of(choice));
        codes[lane * at.codes_stride + 2 * stage + 1] = static_cast<std::uint16_t>(b_of(choice));
      }
    }
    __syncwarp();
    const int count = static_cast<int>(min(Index{2}, num_tokens - first_token));
    if (count <= 0) return;
    write_key_codes(layout, head, group, codes, at.codes_stride,
                    KeyTargets(layout, head, slot_mapping, norms, first_token, count), pages);
  }
}

}  // namespace commvq::cuda
