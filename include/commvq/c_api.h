#ifndef COMMVQ_C_API_H
#define COMMVQ_C_API_H

/** @file
 * The C interface of the compressed cache, for engines in C, Rust, Go or Python.
 *
 * Every function that can fail returns a commvq_status and never lets an exception out;
 * commvq_last_error() then says what was wrong with which value. What a failing function was to
 * write is unchanged, unless noted. Pointers must not be null unless noted. Different handles may
 * be used by different threads at once, forks included; one handle by one thread at a time, but
 * codecs by any number.
 *
 * All arrays are float32 in host memory and belong to the caller; they are not kept. Keys and
 * queries are those before RoPE: the library applies it.
 *
 * Structs begin with struct_size, the caller's sizeof: a library accepts the structs of older and,
 * as long as fields that it does not know are zero, of newer headers.
 */

#include "commvq/core/export.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t commvq_status;
enum {
  COMMVQ_OK = 0,
  COMMVQ_INVALID_ARGUMENT = 1,  /**< null, out of range, not finite, or of another shape */
  COMMVQ_WRONG_STRUCT_SIZE = 2, /**< struct_size is no size of this struct; see above */
  COMMVQ_BAD_FILE = 3,          /**< it cannot be read, or is no codebook file of this version */
  COMMVQ_WRONG_MODEL = 4,       /**< the codebooks were learnt from another model */
  COMMVQ_UNSUPPORTED = 5,       /**< valid, but not computed; the message says what is */
  COMMVQ_OUT_OF_MEMORY = 6,
  COMMVQ_INTERNAL_ERROR = 7 /**< a defect of the library */
};

/** The name of a status, e.g. "COMMVQ_OK"; "unknown" for other numbers. Never null. */
COMMVQ_API const char* commvq_status_name(commvq_status status);

/** What the last function that failed on this thread said, at most 1023 bytes; "" if none did.
 * Functions that succeed leave it alone. Valid until the thread's next failure. Never null. */
COMMVQ_API const char* commvq_last_error(void);

/** The version of the library, e.g. "0.1.0". Never null. */
COMMVQ_API const char* commvq_version(void);

/** Rows of `cols` contiguous floats, consecutive rows `row_stride` floats apart. A row is a token,
 * its columns are [heads][head_dim]. `data` may be null if `rows` is 0. */
typedef struct commvq_const_matrix {
  const float* data; /**< [rows][cols] */
  int64_t rows;      /**< at least 0 */
  int64_t cols;
  int64_t row_stride; /**< at least cols */
} commvq_const_matrix;

/** The same, to be written. */
typedef struct commvq_matrix {
  float* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
} commvq_matrix;

enum { COMMVQ_ROPE_HALF_SPLIT = 0, COMMVQ_ROPE_INTERLEAVED = 1 };
enum { COMMVQ_ROPE_UNSCALED = 0, COMMVQ_ROPE_LINEAR = 1, COMMVQ_ROPE_LLAMA3 = 2 };

/** A model as far as its cache is concerned. */
typedef struct commvq_model {
  size_t struct_size;
  int32_t num_layers;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t rotary_dim;   /**< channels of a head that rotate */
  int32_t rope_layout;  /**< COMMVQ_ROPE_HALF_SPLIT or COMMVQ_ROPE_INTERLEAVED */
  int32_t rope_scaling; /**< COMMVQ_ROPE_UNSCALED, _LINEAR or _LLAMA3 */
  double rope_theta;
  double rope_factor;          /**< linear and Llama 3 */
  double rope_low_freq_factor; /**< Llama 3, and the next two */
  double rope_high_freq_factor;
  double rope_original_max_position;
  const char* digest; /**< names the weights; the codebook file's model_digest */
} commvq_model;

/** The codecs of all layers of a model, read from a codebook file. Immutable. */
typedef struct commvq_codecs commvq_codecs;

/** Reads a codebook file. `*codecs` belongs to the caller: commvq_codecs_destroy. `path` is UTF-8.
 * COMMVQ_BAD_FILE if it cannot be read. */
COMMVQ_API commvq_status commvq_codecs_load(const char* path, commvq_codecs** codecs);

/** Frees codecs; null is allowed. Caches made from them stay valid. */
COMMVQ_API void commvq_codecs_destroy(commvq_codecs* codecs);

/** Writes of which model these codecs are. Set model->struct_size first. `model->digest` lives as
 * long as the codecs. */
COMMVQ_API commvq_status commvq_codecs_describe(const commvq_codecs* codecs, commvq_model* model);

/** COMMVQ_WRONG_MODEL, saying what differs, unless the codecs were learnt from this model. Call it
 * once before use: codebooks of another model of the same shape give nonsense. */
COMMVQ_API commvq_status commvq_codecs_require_model(const commvq_codecs* codecs,
                                                     const commvq_model* model);

enum { COMMVQ_BF16 = 0, COMMVQ_FP16 = 1, COMMVQ_FP32 = 2 };

typedef struct commvq_cache_options {
  size_t struct_size;
  int64_t window;       /**< newest tokens that a query reads exactly, itself included; 128 */
  int64_t sinks;        /**< first tokens that stay exact for good; 0 */
  int64_t page_size;    /**< tokens to a page of codes, a multiple of 8; 64 */
  int32_t exact_type;   /**< of every exact copy: COMMVQ_BF16, COMMVQ_FP16 or COMMVQ_FP32; BF16 */
  int32_t exact_keys;   /**< 1: keys are not coded but kept as exact_type; 0 */
  int32_t exact_values; /**< likewise values; 0 */
  int32_t reserved;     /**< 0 */
} commvq_cache_options;

/** Writes struct_size and the defaults, the last number of each comment above. `struct_size` is the
 * caller's sizeof(commvq_cache_options). */
COMMVQ_API commvq_status commvq_cache_options_init(commvq_cache_options* options,
                                                   size_t struct_size);

/** The compressed keys and values of all layers of one sequence. */
typedef struct commvq_cache commvq_cache;

/** Makes an empty cache. `options` may be null: defaults. `*cache` belongs to the caller:
 * commvq_cache_destroy. */
COMMVQ_API commvq_status commvq_cache_create(const commvq_codecs* codecs,
                                             const commvq_cache_options* options,
                                             commvq_cache** cache);

/** Makes a copy that shares memory with the original until one of them writes. Either may be
 * destroyed first. */
COMMVQ_API commvq_status commvq_cache_fork(const commvq_cache* cache, commvq_cache** fork);

/** Frees a cache; null is allowed. */
COMMVQ_API void commvq_cache_destroy(commvq_cache* cache);

/** Adds tokens to one layer: `keys` (before RoPE) and `values` are
 * [tokens][num_kv_heads * head_dim]. They must be finite and fit exact_type. If it fails the cache
 * is as it was. Add long prompts in chunks: at least window + tokens - 1 tokens stay exact. */
COMMVQ_API commvq_status commvq_cache_append(commvq_cache* cache, int32_t layer,
                                             const commvq_const_matrix* keys,
                                             const commvq_const_matrix* values);

/** Tokens that every layer holds: the shortest layer's, while a step of the model is under way. */
COMMVQ_API commvq_status commvq_cache_length(const commvq_cache* cache, int64_t* length);

/** Bytes of one coded token over all layers, norms and scales included. */
COMMVQ_API commvq_status commvq_cache_bytes_per_token(const commvq_cache* cache, double* bytes);

/** Bytes that pages and exact copies take. Memory shared by forks counts in each of them. */
COMMVQ_API commvq_status commvq_cache_allocated_bytes(const commvq_cache* cache, int64_t* bytes);

/** Keeps the first `length` tokens of every layer; `length` is in [0, commvq_cache_length]. */
COMMVQ_API commvq_status commvq_cache_truncate(commvq_cache* cache, int64_t length);

/** Removes all tokens of all layers. */
COMMVQ_API commvq_status commvq_cache_clear(commvq_cache* cache);

typedef struct commvq_attention_options {
  size_t struct_size;
  int64_t sliding_window; /**< a query sees the newest so many tokens, itself included; 0: all; 0 */
  float scale;            /**< of the scores; 0: 1 / sqrt(head_dim); 0 */
  float soft_cap;         /**< scores become cap * tanh(score / cap); 0: none; 0 */
  int32_t causal;         /**< 1: a query sees no token after its own; 0 only with one query; 1 */
  int32_t reserved;       /**< 0 */
} commvq_attention_options;

/** As commvq_cache_options_init. */
COMMVQ_API commvq_status commvq_attention_options_init(commvq_attention_options* options,
                                                       size_t struct_size);

/** Attention of the newest queries->rows positions of a layer, whose keys and values were appended
 * before. `queries` (before RoPE) is [positions][num_q_heads * head_dim]; num_q_heads is a multiple
 * of num_kv_heads, and query head h reads KV head h / (num_q_heads / num_kv_heads). `options` may
 * be null: defaults. `output` has the shape of the queries and must not overlap them. `lse` is null
 * or [positions][num_q_heads] and receives the natural logarithm of the sum of the exponentials of
 * the scores. More queries than tokens with exact copies are refused: attend after each append.
 * COMMVQ_UNSUPPORTED for several queries that are not causal. COMMVQ_INVALID_ARGUMENT, with the
 * output written, where scores or values overflow a float. */
COMMVQ_API commvq_status commvq_cache_attend(const commvq_cache* cache, int32_t layer,
                                             const commvq_const_matrix* queries,
                                             const commvq_attention_options* options,
                                             const commvq_matrix* output, float* lse);

#ifdef __cplusplus
}
#endif

#endif
