#pragma once

#include <cstdint>
#include <vector>

#include "commvq/cache/key_tables.hpp"

/// The inner loops of attention. All arrays of floats are padded with zeros to whole vectors of 16.
namespace commvq::attention {

/// Tokens that share one rotation of the queries: keys are rotated by their offset from the first.
inline constexpr int kSubtile = 16;
/// Tokens between two updates of the running softmax.
inline constexpr int kTile = 64;
/// Value code bits that are added up at a time.
inline constexpr int kCodeLanes = 32;

/// What `sum_rows` needs besides its arguments.
struct RowScratch {
  std::vector<std::uint32_t> offsets;  ///< `[count][num_codes]`: of rows in their books
  std::vector<std::int16_t> sums;      ///< `[count][KeyTables::row_size()]`
};

/// Reads `count` codes of `width` bits, at most 16, from the start of a stream as `put_bits` writes
/// it. Reads up to eight bytes past the last code.
void unpack_codes(const std::uint8_t* stream, int width, Index count, std::uint16_t* codes);

/// Adds up the rows of each of `count` tokens of one head. `codes` is
/// `[count][num_groups][num_stages][2]`; `planar` `[count][2 * padded_head_pairs]` receives
/// integers, real parts, then imaginary parts, in units of `KeyTables::units`. Its padding is left
/// alone or receives zeros. `scratch` keeps its memory between calls.
void sum_rows(const KeyTables& tables, int head, const std::uint16_t* codes, int count,
              int padded_head_pairs, std::int16_t* planar, RowScratch& scratch);

/// Rotates a planar head by `rotation` (cosines, then sines), all `[2 * padded_pairs]`.
void rotate(const float* planar, const float* rotation, int padded_pairs, float* rotated);
void rotate(const std::int16_t* planar, const float* rotation, int padded_pairs, float* rotated);
/// Rotates by the opposite angles.
void rotate_back(const float* planar, const float* rotation, int padded_pairs, float* rotated);

/// scores[r * kTile + t] = <query r, key t> for kSubtile keys. `queries` `[rows][width]`, `keys`
/// `[kSubtile][width]`.
void score_subtile(const float* queries, int rows, const float* keys, int width, float* scores);

/// The same for integer keys `[kSubtile][2 * padded_pairs]`, each of which is first rotated by its
/// row of `rotations` (cosines, then sines). Every four rows repeat that: for few queries it costs
/// less than to store rotated keys.
void score_turning_subtile(const float* queries, int rows, const std::int16_t* keys,
                           const float* rotations, int padded_pairs, float* scores);

/// sums[r][i] += sum over the tokens t of a tile of weights[r * kTile + t] * (bit t % 8 of
/// bytes[t / 8][i]), for the first 8 `num_bytes` tokens; other weights must be zero, none negative.
/// Weights are added up in fixed point: the error is at most 2^-11 of their sum in the tile.
/// `bytes` `[num_bytes][byte_stride]` of which num_code_bits columns are read, `sums`
/// `[rows][stride]`; num_code_bits is a multiple of kCodeLanes.
void add_code_bits(const std::uint8_t* bytes, Index byte_stride, int num_bytes, Index num_code_bits,
                   const float* weights, int rows, float* sums, Index stride);

/// sums[r][d] += sum over the code bits i of codes[r][i] * decoder[i][d]. `codes`
/// `[rows][codes_stride]`, `decoder` `[num_code_bits][decoder_stride]` of which `head_dim` columns
/// are read, `sums` `[rows][stride]`.
void add_decoded(const float* decoder, Index decoder_stride, Index num_code_bits, int head_dim,
                 const float* codes, Index codes_stride, int rows, float* sums, Index stride);

/// sums[r][d] += sum over `count` tokens of weights[r * kTile + t] * values[t][d]; `values`
/// `[count][width]`, `sums` `[rows][stride]`.
void add_values(const float* values, int count, int width, const float* weights, int rows,
                float* sums, Index stride);

}  // namespace commvq::attention
