#pragma once

#include <cstdint>

#include "commvq/cuda/page_layout.hpp"

#include <cuda_runtime_api.h>

/// Kernels of the value trainer between its matrix products. Pointers are device memory, matrices
/// row-major with one row a value of the batch; everything is enqueued on the given stream.
/// `tokens` is the number of rows.
namespace commvq::cuda::value_trainer {

/// units [tokens][C] = values[rows[i]] / norm, their LayerNorm without and with gain and bias, and
/// the norms [tokens] (null: not wanted). Values of norm 0 give zeros.
struct Inputs {
  Index tokens, num_channels;
  const float* values;  ///< [any][C]
  const Index* rows;    ///< [tokens]
  const float* gain;    ///< [C]
  const float* bias;    ///< [C]
  float* units;
  float* standardized;
  float* scaled;
  double* norms;
};
void load_units(const Inputs& inputs, cudaStream_t stream);

/// hidden = GELU(hidden + bias) in place; slope [tokens][H]: its derivative, null: not wanted.
void apply_gelu(Index tokens, Index hidden_size, const float* bias, float* hidden, float* slope,
                cudaStream_t stream);

/// Bits [tokens][2 * num_groups] of the largest of each group's four logits + bias + noise; the
/// first of equals. With a temperature above 0 noise is that of `gumbel::uniform_at` and the logits
/// become probabilities; with 0 there is neither.
void choose_patterns(Index tokens, Index num_groups, const float* bias, std::uint32_t noise_key,
                     float temperature, float* logits, float* bits, cudaStream_t stream);

/// decoded u becomes the gradient of the mean of |v - u / |u||^2; losses [tokens]: its terms.
void restore_norms(Index tokens, Index num_channels, const float* units, float* decoded,
                   float* losses, cudaStream_t stream);

/// Probabilities to gradients of the logits, from those of the bits.
void backward_through_choice(Index tokens, Index num_groups, const float* bit_gradients,
                             float temperature, float* logits, cudaStream_t stream);

/// x *= y, `size` numbers.
void multiply_each(Index size, const float* y, float* x, cudaStream_t stream);

/// sums [cols] = over rows of x, or of x * y where y is not null.
void sum_columns(Index rows, Index cols, const float* x, const float* y, float* sums,
                 cudaStream_t stream);

/// A step of Adam with betas 0.9 and 0.999; `rate` includes the correction of the moments' start.
void adam_step(Index size, float rate, const float* gradients, float* first_moments,
               float* second_moments, float* parameters, cudaStream_t stream);

/// Ties a graded decoder, [num_bits][num_channels]: see graded_decoder::tie.
void tie_decoder(Index num_bits, Index num_channels, float* decoder, cudaStream_t stream);

/// Flips bits, or moves numbers of `graded` codes, where that lowers the error, up to `sweeps`
/// times over: see value_polish::polish. `gram` [bits][bits]: E E^T; value_products [tokens][bits]:
/// E v; sum_products [tokens][bits]: (E E^T) b. Returns false if the device lacks the shared
/// memory.
[[nodiscard]] bool polish(Index tokens, int num_bits, int sweeps, bool graded, const float* gram,
                          const float* value_products, const float* sum_products, float* bits,
                          cudaStream_t stream);

/// Scales of unit values as they are stored: s = bf16(norm / |u|) / norm. bits *= s; errors
/// [tokens]: |unit - s u|^2.
void scale_bits(Index tokens, Index num_channels, Index num_bits, const double* norms,
                const float* units, const float* decoded, float* bits, float* errors,
                cudaStream_t stream);

}  // namespace commvq::cuda::value_trainer
