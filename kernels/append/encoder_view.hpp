#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "commvq/cuda/append.hpp"

#include "config.hpp"

namespace commvq::cuda {

inline COMMVQ_HOST_DEVICE Index round_up(Index count, Index multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

/// Columns of a byte of binary key codes, four stages, in the search's products: what each of the
/// eight bits switches on, then for each stage what it adds in any case, and zeros.
inline constexpr int kBinaryColumns = 16;
/// Steps of 16 bits that hold the bits before a byte, and those of all bytes before it.
inline COMMVQ_HOST_DEVICE int binary_steps_of(int byte) {
  return (byte + 1) / 2;
}
inline COMMVQ_HOST_DEVICE int binary_steps_before(int byte) {
  return byte * byte / 4;
}

/// What bits a and b of one stage add to the errors of a later stage of the same byte: twice the
/// inner products of what they switch on with what that one's a, b and base are.
struct alignas(16) BinaryStep {
  float both;  ///< of a and b with each other
  float a_to_a, b_to_a;
  float a_to_b, b_to_b;
  float a_to_base, b_to_base;
  float unused;
};

/// Tables of the search for binary key codes: see binary_search.cuh.
struct BinarySearchView {
  int num_bytes = 0;      ///< of the codes of a head: four stages each; 0: not such codes
  float key_scale = 1;    ///< of keys as operands
  float key_factor = 1;   ///< scaled product of key and column -> -2 <key, column>
  float gram_factor = 1;  ///< scaled product of bits and grams -> what is added for the bits
  /// Columns, scaled: [heads][bytes][padded_row_size / 16][2 tiles][32 lanes][4].
  const std::uint32_t* directions = nullptr;
  /// What belongs to a column's error beside products with the key and with bits,
  /// [heads][bytes][kBinaryColumns].
  const float* offsets = nullptr;
  /// Twice the inner products of columns with what earlier bytes' bits switch on, scaled:
  /// [heads][steps of all bytes][2 tiles][32 lanes][4].
  const std::uint32_t* grams = nullptr;
  /// [heads][num_stages][4 stages of the byte].
  const BinaryStep* steps = nullptr;
};

/// Matrix-product operands are powers of two times the numbers they stand for, so that fp16 holds
/// them and their rest: scaled = number * scale.
struct KeyEncoderView {
  int group_pairs = 0;
  int row_size = 0;         ///< 2 * group_pairs
  int padded_row_size = 0;  ///< to a multiple of 16
  int num_stages = 0;
  int codebook_size = 0;
  int padded_books = 0;  ///< 2 * codebook_size to a multiple of 8
  int padded_size = 0;   ///< codebook_size to a multiple of 64
  int beam_width = 1;
  int num_search_rows = kKeySearch.num_rows;  ///< of a block of the search
  float residual_scale = 1;
  float product_factor = 1;  ///< scaled product -> -2 <r, Z>
  /// Channel of planar index i of a head, [head_dim].
  const std::uint16_t* channels = nullptr;
  /// What the error of planar index i of a head is multiplied by, [heads][head_dim]; null: 1. Rows
  /// and all that is made of them are multiplied already.
  const float* weights = nullptr;
  /// fp32 rows, [heads][groups][stages][2 * codebook_size][row_size].
  const float* rows = nullptr;
  /// The same, scaled, as operands of the matrix instruction: [heads][groups][stages]
  /// [padded_books / 8][padded_row_size / 16][32 lanes][hi b0, hi b1, lo b0, lo b1].
  const std::uint32_t* operands = nullptr;
  /// Squared norms, [heads][groups][stages][2 * codebook_size].
  const float* squared_norms = nullptr;
  /// 2 <Z_0[a], Z_1[b]>: [heads][groups][stages][codebook_size a][codebook_size b], and
  /// [...][codebook_size b][padded_size a], zero where there is no a.
  const float* cross_terms = nullptr;
  const float* cross_terms_by_b = nullptr;
  /// Cross terms of two neighbouring b as 16-bit integers: [...][codebook_size / 2][padded_size a].
  /// Null where `screens` is false.
  const std::uint32_t* rounded_cross_terms = nullptr;
  /// What 1 of these integers stands for, [heads][groups][stages].
  const float* cross_units = nullptr;
  BinarySearchView binary;
  /// SearchStage<books_are_tied> [heads][groups][stages], for the search by warpgroups: of books of
  /// 64 centroids over 64 pairs with beams of up to 8, where the device has it. Then of the above
  /// there are only cross_terms, and with `binary` none. Operands have the scale of residuals.
  const std::uint8_t* search_stages = nullptr;
  bool books_are_tied = false;
  float search_factor = 1;  ///< scaled product -> -2 <r, Z>

  /// Whether greedy searches look for the best a in integers first: the terms of b of one row then
  /// take the place of its operands, sixteen bytes at a time.
  COMMVQ_HOST_DEVICE bool screens() const {
    return codebook_size % 8 == 0 && codebook_size <= padded_row_size;
  }
  COMMVQ_HOST_DEVICE int operand_words() const {  // of one stage
    return padded_books / 8 * (padded_row_size / 16) * 32 * 4;
  }
};

/// How key codes are searched for: see key_search.cuh.
enum class KeySearchKind { kBeam, kGreedy, kScreenedGreedy };  // and binary_search.cuh
inline KeySearchKind search_kind(const KeyEncoderView& keys) {
  if (keys.beam_width > 1) return KeySearchKind::kBeam;
  return keys.screens() ? KeySearchKind::kScreenedGreedy : KeySearchKind::kGreedy;
}

/// One layer of the value networks: `[blocks][padded_outputs][padded_inputs]` fp16, and its rest.
struct Weights {
  int num_inputs = 0;  ///< padded
  int num_outputs = 0;
  int num_padded_outputs = 0;
  const std::uint16_t* hi = nullptr;
  const std::uint16_t* lo = nullptr;  ///< null in fp16 precision
  const float* bias = nullptr;        ///< [blocks][num_padded_outputs] or null
  float product_factor = 1;           ///< scaled product -> product
};

/// The numbers are those of one block; a row of the matrix products is one block of one token, row
/// block * num_tokens + token.
struct ValueEncoderView {
  int num_blocks = 1;
  int num_channels = 0;
  int num_code_bits = 0;
  const float* channel_scales = nullptr;  ///< [blocks][C]: what values are divided by; null: 1
  const float* norm_gain = nullptr;       ///< [blocks][C]
  const float* norm_bias = nullptr;
  float input_scale = 1;            ///< of LayerNorm's output
  float hidden_scale = 1;           ///< of GELU's
  Weights hidden, output, decoder;  ///< decoder: [C][num_code_bits], E transposed
  double length_factor = 1;         ///< length of a sum of scaled decoder rows -> |u|

  int polish_sweeps = 0;  ///< with 0 nothing below is set
  bool graded = false;    ///< numbers of the code are polished, not bits
  float unit_scale = 1;   ///< of unit values as operands
  Weights rows, gram;     ///< [num_code_bits][C], E; [num_code_bits][num_code_bits], E E^T
  const float* gram_rows = nullptr;  ///< E E^T in fp32, [blocks][num_code_bits][num_code_bits]

  COMMVQ_HOST_DEVICE int num_terms() const { return hidden.lo != nullptr ? 3 : 1; }
};

/// What `append` reads. Plain data; the memory belongs to the `DeviceEncoder`.
struct EncoderView {
  DevicePageLayout layout;
  KeyEncoderView keys;
  ValueEncoderView values;
  /// Multiprocessors of a device whose code multiplies by warpgroups; 0: other devices and code.
  int warpgroup_processors = 0;

  COMMVQ_HOST_DEVICE int num_channels() const { return layout.num_kv_heads * layout.head_dim; }
};

/// Arrays of the workspace, each on 256 bytes. A row is one block of one token's values.
struct AppendWorkspace {
  float* unit_keys = nullptr;          ///< [tokens][heads][head_dim] planar
  std::uint16_t* key_norms = nullptr;  ///< [tokens] bf16; NaN: the key cannot be coded
  double* value_norms = nullptr;       ///< [rows]; NaN likewise
  std::uint16_t* inputs = nullptr;     ///< [terms > 1 ? 2 : 1][rows][hidden.num_inputs] fp16
  std::uint16_t* hidden = nullptr;     ///< [...][rows][output.num_inputs] fp16
  std::uint16_t* bits = nullptr;       ///< [rows][decoder.num_inputs] fp16, 0 or 1
  float* squares = nullptr;            ///< [column tiles of the decoder][rows]
  // With polish only:
  std::uint16_t* units = nullptr;   ///< [2][rows][rows.num_inputs] fp16
  float* value_products = nullptr;  ///< [rows][num_code_bits]: E v
  float* sum_products = nullptr;    ///< [rows][num_code_bits]: E E^T b
  std::size_t bytes = 0;

  AppendWorkspace(const EncoderView& encoder, Index tokens, void* memory) {
    const Index parts = encoder.values.num_terms() > 1 ? 2 : 1;
    const auto base = reinterpret_cast<std::uintptr_t>(memory);
    const auto take = [&](auto*& array, Index count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(base + bytes);
      bytes += static_cast<std::size_t>(round_up(count * static_cast<Index>(sizeof(*array)), 256));
    };
    const ValueEncoderView& values = encoder.values;
    const Index rows = tokens * values.num_blocks;
    take(unit_keys, tokens * encoder.num_channels());
    take(key_norms, tokens * encoder.layout.norms_per_token);
    take(value_norms, rows);
    take(inputs, parts * rows * values.hidden.num_inputs);
    take(hidden, parts * rows * values.output.num_inputs);
    take(bits, rows * values.decoder.num_inputs);
    take(squares, values.decoder.num_padded_outputs / kSmallTile.cols * rows);
    if (values.polish_sweeps == 0) return;
    take(units, 2 * rows * values.rows.num_inputs);
    take(value_products, rows * values.num_code_bits);
    take(sum_products, rows * values.num_code_bits);
  }
};

/// Shared memory of a block of the key search, offsets in bytes.
struct KeySearchShared {
  int operand_stride;  ///< fp16 numbers between rows of the residuals' operands
  int table_stride;    ///< floats between rows of the table
  int first_b;         ///< column of the table where the terms of B begin

  Index residuals;  ///< float [rows][padded_row_size]
  Index hi, lo;     ///< fp16 [rows][operand_stride]
  Index table;      ///< float [rows][table_stride]: terms of A, then of B
  Index minima;     ///< float [rows][codebook_size], beams only
  Index errors;     ///< float [2][rows]: errors; least terms of B, where `screens`
  Index choices;    ///< std::uint64_t [rows]: of this stage
  Index history;    ///< uint32 [stages][rows]: parent << 28 | a << 14 | b
  Index bytes;

  COMMVQ_HOST_DEVICE KeySearchShared(const KeyEncoderView& keys, int num_rows) {
    const Index rows = num_rows;
    operand_stride = keys.padded_row_size + 8;
    first_b = static_cast<int>(round_up(keys.codebook_size, 4));
    table_stride = 2 * first_b + 8;
    Index at = 0;
    residuals = at;
    hi = at += Index{4} * rows * keys.padded_row_size;
    lo = at += Index{2} * rows * operand_stride;
    table = at += Index{2} * rows * operand_stride;
    minima = at += Index{4} * rows * table_stride;
    errors = at += keys.beam_width > 1 ? Index{4} * rows * keys.codebook_size : 0;
    choices = at += Index{2} * 4 * rows;
    at += Index{8} * rows;
    // In the end the codes, [tokens][2 * num_stages and at most one more], replace all but history.
    const Index codes = 2 * (rows / keys.beam_width) * (2 * keys.num_stages + 1);
    history = at > codes ? at : round_up(codes, 16);
    bytes = history + Index{4} * rows * keys.num_stages;
  }
};

/// Shared memory of a block of the search for binary key codes, offsets in bytes.
struct BinarySearchShared {
  int operand_stride;  ///< fp16 numbers between rows of the keys' operands
  int product_stride;  ///< floats between rows of the products
  int hi, lo;          ///< fp16 [tokens][operand_stride]
  int products;        ///< float [tokens][product_stride]: products with keys, and offsets
  int choices;         ///< BinaryChoice [tokens][kMaxBinaryBeam]
  int errors;          ///< float [tokens]
  int bytes;

  COMMVQ_HOST_DEVICE explicit BinarySearchShared(const KeyEncoderView& keys) {
    constexpr int kTokens = kBinarySearch.num_tokens;
    operand_stride = keys.padded_row_size + 8;
    product_stride = keys.binary.num_bytes * kBinaryColumns + 8;
    hi = 0;
    lo = hi + 2 * kTokens * operand_stride;
    products = lo + 2 * kTokens * operand_stride;
    choices = products + 4 * kTokens * product_stride;
    errors = choices + 8 * kTokens * kMaxBinaryBeam;
    bytes = errors + 4 * kTokens;
  }
};

/// What `warpgroup_processors` is on the current device. Returns a cudaError_t.
int find_warpgroup_processors(int& processors) noexcept;
/// Lets the kernels of `append` use all the shared memory that the current device has. Likewise.
int configure_append_kernels(const EncoderView& encoder) noexcept;

}  // namespace commvq::cuda
