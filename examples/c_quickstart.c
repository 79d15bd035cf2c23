/* Compresses keys and values with learnt codebooks and attends over the codes, from C.
 * c_quickstart CODEBOOKS */
#include "commvq/c_api.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { kTokens = 400, kGroup = 4 }; /* query heads to a KV head */

static void check(commvq_status status) {
  if (status == COMMVQ_OK) return;
  fprintf(stderr, "%s: %s\n", commvq_status_name(status), commvq_last_error());
  exit(1);
}

/* Stand-ins for what a model computes: random combinations of a few waves. */
static void fill(float* rows, int64_t count, int64_t cols, unsigned seed) {
  srand(seed);
  for (int64_t t = 0; t < count; ++t)
    for (int wave = 1; wave <= 8; ++wave) {
      const float weight = (float)rand() / (float)RAND_MAX;
      for (int64_t c = 0; c < cols; ++c)
        rows[t * cols + c] += weight * sinf((float)(wave * (c + 1)));
    }
}

int main(int argc, char** argv) {
  if (argc != 2) return fprintf(stderr, "usage: c_quickstart CODEBOOKS\n"), 2;
  commvq_codecs* codecs;
  check(commvq_codecs_load(argv[1], &codecs));
  commvq_model model = {.struct_size = sizeof model};
  check(commvq_codecs_describe(codecs, &model)); /* an engine fills it and calls require_model */

  commvq_cache_options options;
  check(commvq_cache_options_init(&options, sizeof options));
  commvq_cache *coded, *exact;
  check(commvq_cache_create(codecs, &options, &coded));
  options.exact_keys = options.exact_values = 1;
  check(commvq_cache_create(codecs, &options, &exact));

  const int64_t channels = (int64_t)model.num_kv_heads * model.head_dim, width = kGroup * channels;
  float* keys = calloc((size_t)(kTokens * channels), sizeof *keys);
  float* values = calloc((size_t)(kTokens * channels), sizeof *values);
  float* rows = calloc((size_t)(3 * width), sizeof *rows); /* a query, two outputs */
  fill(keys, kTokens, channels, 1);
  fill(values, kTokens, channels, 2);
  fill(rows, 1, width, 3);
  const commvq_const_matrix k = {keys, kTokens, channels, channels};
  const commvq_const_matrix v = {values, kTokens, channels, channels};
  const commvq_const_matrix query = {rows, 1, width, width};
  const commvq_matrix output = {rows + width, 1, width, width};
  const commvq_matrix expected = {rows + 2 * width, 1, width, width};
  check(commvq_cache_append(coded, 0, &k, &v)); /* an engine does so for every layer */
  check(commvq_cache_append(exact, 0, &k, &v));
  check(commvq_cache_attend(coded, 0, &query, NULL, &output, NULL));
  check(commvq_cache_attend(exact, 0, &query, NULL, &expected, NULL));

  double error = 0, total = 0, bytes[2];
  for (int64_t i = 0; i < width; ++i) {
    error += pow(output.data[i] - expected.data[i], 2);
    total += pow(expected.data[i], 2);
  }
  check(commvq_cache_bytes_per_token(coded, &bytes[0]));
  check(commvq_cache_bytes_per_token(exact, &bytes[1]));
  printf("%.1f bytes a token instead of %.1f; relative error of attention %.3f\n", bytes[0],
         bytes[1], sqrt(error / total));
  free(rows), free(values), free(keys);
  commvq_cache_destroy(exact);
  commvq_cache_destroy(coded);
  commvq_codecs_destroy(codecs);
  return 0;
}
