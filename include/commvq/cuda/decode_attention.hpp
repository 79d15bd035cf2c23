#pragma once

#include <cstddef>
#include <cstdint>

#include "commvq/cuda/device_codebooks.hpp"
#include "commvq/cuda/paged_cache.hpp"
#include "commvq/cuda/status.hpp"

struct CUstream_st;

namespace commvq::cuda {

/// What a workspace is large enough for.
struct DecodeLimits {
  int batch = 1;
  int num_query_tokens = 1;  ///< of each sequence, in [1, 16]
  int num_q_heads = 1;
  Index total_tokens = 0;  ///< of all sequences of one call together
};

/// One call of `decode_attention`. All pointers are device memory that the caller owns; what they
/// point to is read while the work runs, so a captured graph replays with new lengths and pages.
struct DecodeAttention {
  const void* queries = nullptr;  ///< [batch][num_query_tokens][num_q_heads][head_dim], before RoPE
  void* output = nullptr;         ///< the same shape and type
  float* lse = nullptr;  ///< [batch][num_query_tokens][num_q_heads] or null: natural log-sum-exp
  FloatType type = FloatType::kBf16;  ///< of queries and output: kBf16 or kFp16

  PagedCodes pages;
  const std::int32_t* block_table =
      nullptr;  ///< [batch][max_blocks]: page of each page_size tokens
  int max_blocks = 0;
  const std::int32_t* seq_lens = nullptr;  ///< [batch]: tokens cached, the queries' own included

  ExactTokens exact;                          ///< capacity 0: everything is read as codes
  const std::int32_t* exact_slots = nullptr;  ///< [batch]: slot of each sequence in `exact`
  /// [batch] or null: tokens below this have no exact copy any more. Null stands for
  /// seq_len - exact.capacity.
  const std::int32_t* exact_begin = nullptr;
  int window = 0;  ///< a query reads the newest so many tokens, itself included, exactly

  float scale = 0.0f;      ///< of the scores; 0 stands for 1 / sqrt(head_dim)
  float soft_cap = 0.0f;   ///< scores become cap * tanh(score / cap); 0: none
  int sliding_window = 0;  ///< a query sees the newest so many tokens, itself included; 0: all

  DecodeLimits limits;        ///< batch, num_query_tokens and num_q_heads of this call; most tokens
  void* workspace = nullptr;  ///< on 256 bytes
  std::size_t workspace_bytes = 0;
  CUstream_st* stream = nullptr;
};

/// Bytes that `decode_attention` needs beside its arguments for calls within `limits`. The contents
/// need not be kept between calls, nor be initialised.
std::size_t decode_workspace_size(const DeviceCodebooks& codebooks, const DecodeLimits& limits);

/// Causal attention of the newest num_query_tokens positions of every sequence over the paged codes
/// and the exact tokens: query token i of a sequence stands at seq_len - num_query_tokens + i.
/// Query head h reads KV head h / (num_q_heads / num_kv_heads).
///
/// Enqueues work on the stream and returns; never allocates, synchronises or prints. May be
/// captured in a graph; replays follow seq_lens, block_table and exact_slots as they are then.
/// Sequences shorter than num_query_tokens, and sequences that together exceed limits.total_tokens,
/// get NaN. The result does not depend on what else runs, and is the same every time.
///
/// Returns kInvalidArgument, kUnsupported, kWorkspaceTooSmall or kCudaError, having enqueued
/// nothing, or kOk.
Status decode_attention(const DeviceCodebooks& codebooks, const DecodeAttention& call) noexcept;

}  // namespace commvq::cuda
