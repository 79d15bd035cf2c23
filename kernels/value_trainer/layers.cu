#include "commvq/value_codec/value_codec.hpp"

#include "block_sums.cuh"
#include "common/memory.cuh"
#include "kernels.hpp"
#include "learner/graded_tie.hpp"
#include "learner/gumbel.hpp"

namespace commvq::cuda::value_trainer {
namespace {

/// A block a value.
__global__ void __launch_bounds__(kThreads) load_units_kernel(Inputs in) {
  const Index row = blockIdx.x, C = in.num_channels;
  const float* const value = in.values + in.rows[row] * C;
  float* const units = in.units + row * C;
  double square = 0;
  for (Index c = threadIdx.x; c < C; c += kThreads)
    square += static_cast<double>(value[c]) * value[c];
  const double norm = sqrt(block_sum(square));
  float sum = 0;
  for (Index c = threadIdx.x; c < C; c += kThreads) {
    const float unit = norm > 0 ? static_cast<float>(value[c] / norm) : 0.0f;
    units[c] = unit;
    sum += unit;
  }
  const float mean = block_sum(sum) / static_cast<float>(C);
  float squares = 0;
  for (Index c = threadIdx.x; c < C; c += kThreads)
    squares += (units[c] - mean) * (units[c] - mean);
  const float variance = block_sum(squares) / static_cast<float>(C);
  const float factor = 1.0f / sqrtf(variance + kValueLayerNormEpsilon);
  for (Index c = threadIdx.x; c < C; c += kThreads) {
    const float standard = (units[c] - mean) * factor;
    in.standardized[row * C + c] = standard;
    in.scaled[row * C + c] = standard * in.gain[c] + in.bias[c];
  }
  if (in.norms != nullptr && threadIdx.x == 0) in.norms[row] = norm;
}

__global__ void gelu_kernel(Index size, Index cols, const float* bias, float* hidden,
                            float* slope) {
  const Index i = Index{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= size) return;
  const float x = hidden[i] + bias[i % cols];
  const float phi = 0.5f * erfcf(-x * 0.70710678f);
  constexpr float kInverseRootTwoPi = 0.39894228f;
  if (slope != nullptr) slope[i] = phi + x * kInverseRootTwoPi * expf(-0.5f * x * x);
  hidden[i] = x * phi;
}

/// A thread a group.
__global__ void choose_kernel(Index size, Index num_groups, const float* bias,
                              std::uint32_t noise_key, float temperature, float* logits,
                              float* bits) {
  const Index i = Index{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= size) return;
  float4 four = reinterpret_cast<const float4*>(logits)[i];
  const float4 of_bias = reinterpret_cast<const float4*>(bias)[i % num_groups];
  float z[4] = {four.x + of_bias.x, four.y + of_bias.y, four.z + of_bias.z, four.w + of_bias.w};
  if (temperature > 0)
    for (int k = 0; k < 4; ++k)
      z[k] -= logf(-logf(gumbel::uniform_at(noise_key, static_cast<std::uint32_t>(4 * i + k))));
  int pattern = 0;
  float largest = z[0];
  for (int k = 1; k < 4; ++k)
    if (z[k] > largest) largest = z[k], pattern = k;
  reinterpret_cast<float2*>(bits)[i] = {pattern == 0 || pattern == 2 ? 1.0f : 0.0f,
                                        pattern == 1 || pattern == 2 ? 1.0f : 0.0f};
  if (!(temperature > 0)) return;
  float total = 0;
  for (int k = 0; k < 4; ++k) total += z[k] = expf((z[k] - largest) / temperature);
  const float factor = 1.0f / total;
  four = {z[0] * factor, z[1] * factor, z[2] * factor, z[3] * factor};
  reinterpret_cast<float4*>(logits)[i] = four;
}

/// A block a value.
__global__ void __launch_bounds__(kThreads)
    restore_kernel(Index tokens, Index C, const float* units, float* decoded, float* losses) {
  const Index row = blockIdx.x;
  const float* const unit = units + row * C;
  float* const u = decoded + row * C;
  float square = 0;
  for (Index c = threadIdx.x; c < C; c += kThreads) square += u[c] * u[c];
  const float length = fmaxf(sqrtf(block_sum(square)), 1e-20f);
  float cosine = 0, loss = 0;
  for (Index c = threadIdx.x; c < C; c += kThreads) {
    const float direction = u[c] / length;
    cosine += direction * unit[c];
    loss += (unit[c] - direction) * (unit[c] - direction);
  }
  cosine = block_sum(cosine);
  loss = block_sum(loss);
  const float factor = 2 / (length * static_cast<float>(tokens));
  for (Index c = threadIdx.x; c < C; c += kThreads)
    u[c] = (cosine * (u[c] / length) - unit[c]) * factor;
  if (threadIdx.x == 0) losses[row] = loss;
}

__global__ void backward_kernel(Index size, const float* bit_gradients, float temperature,
                                float* logits) {
  const Index i = Index{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= size) return;
  float4 z = reinterpret_cast<const float4*>(logits)[i];
  const float2 d = reinterpret_cast<const float2*>(bit_gradients)[i];
  const float mean = (z.x + z.z) * d.x + (z.y + z.z) * d.y;
  z.x *= (d.x - mean) / temperature;
  z.y *= (d.y - mean) / temperature;
  z.z *= (d.x + d.y - mean) / temperature;
  z.w *= -mean / temperature;
  reinterpret_cast<float4*>(logits)[i] = z;
}

__global__ void multiply_each_kernel(Index size, const float* y, float* x) {
  const Index i = Index{blockIdx.x} * kThreads + threadIdx.x;
  if (i < size) x[i] *= y[i];
}

__global__ void sum_columns_kernel(Index rows, Index cols, const float* x, const float* y,
                                   float* sums) {
  const Index col = Index{blockIdx.x} * kThreads + threadIdx.x;
  if (col >= cols) return;
  float sum = 0;
  for (Index row = 0; row < rows; ++row) {
    const Index at = row * cols + col;
    sum += y == nullptr ? x[at] : x[at] * y[at];
  }
  sums[col] = sum;
}

__global__ void adam_kernel(Index size, float rate, const float* gradients, float* first,
                            float* second, float* parameters) {
  const Index i = Index{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= size) return;
  const float gradient = gradients[i];
  const float m = first[i] = 0.9f * first[i] + 0.1f * gradient;
  const float v = second[i] = 0.999f * second[i] + 0.001f * gradient * gradient;
  parameters[i] -= rate * m / (sqrtf(v) + 1e-8f);
}

/// A thread a channel of a byte's rows.
__global__ void tie_kernel(Index size, Index C, float* decoder) {
  const Index i = Index{blockIdx.x} * kThreads + threadIdx.x;
  if (i < size) graded_decoder::tie_channel(decoder + i / C * 8 * C + i % C, C);
}

unsigned blocks_for(Index count) {
  return static_cast<unsigned>((count + kThreads - 1) / kThreads);
}

}  // namespace

void load_units(const Inputs& inputs, cudaStream_t stream) {
  load_units_kernel<<<static_cast<unsigned>(inputs.tokens), kThreads, 0, stream>>>(inputs);
}

void apply_gelu(Index tokens, Index hidden_size, const float* bias, float* hidden, float* slope,
                cudaStream_t stream) {
  const Index size = tokens * hidden_size;
  gelu_kernel<<<blocks_for(size), kThreads, 0, stream>>>(size, hidden_size, bias, hidden, slope);
}

void choose_patterns(Index tokens, Index num_groups, const float* bias, std::uint32_t noise_key,
                     float temperature, float* logits, float* bits, cudaStream_t stream) {
  const Index size = tokens * num_groups;
  choose_kernel<<<blocks_for(size), kThreads, 0, stream>>>(size, num_groups, bias, noise_key,
                                                           temperature, logits, bits);
}

void restore_norms(Index tokens, Index num_channels, const float* units, float* decoded,
                   float* losses, cudaStream_t stream) {
  restore_kernel<<<static_cast<unsigned>(tokens), kThreads, 0, stream>>>(tokens, num_channels,
                                                                         units, decoded, losses);
}

void backward_through_choice(Index tokens, Index num_groups, const float* bit_gradients,
                             float temperature, float* logits, cudaStream_t stream) {
  const Index size = tokens * num_groups;
  backward_kernel<<<blocks_for(size), kThreads, 0, stream>>>(size, bit_gradients, temperature,
                                                             logits);
}

void multiply_each(Index size, const float* y, float* x, cudaStream_t stream) {
  multiply_each_kernel<<<blocks_for(size), kThreads, 0, stream>>>(size, y, x);
}

void sum_columns(Index rows, Index cols, const float* x, const float* y, float* sums,
                 cudaStream_t stream) {
  sum_columns_kernel<<<blocks_for(cols), kThreads, 0, stream>>>(rows, cols, x, y, sums);
}

void adam_step(Index size, float rate, const float* gradients, float* first_moments,
               float* second_moments, float* parameters, cudaStream_t stream) {
  adam_kernel<<<blocks_for(size), kThreads, 0, stream>>>(size, rate, gradients, first_moments,
                                                         second_moments, parameters);
}

void tie_decoder(Index num_bits, Index num_channels, float* decoder, cudaStream_t stream) {
  const Index size = num_bits / 8 * num_channels;
  tie_kernel<<<blocks_for(size), kThreads, 0, stream>>>(size, num_channels, decoder);
}

}  // namespace commvq::cuda::value_trainer
