// A program of the compiled library: learns codecs of two layers, keeps them in a file, compresses
// and attends. calibrate_and_attend CODEBOOKS
#include <cmath>
#include <cstdio>
#include <random>

#include "commvq/commvq.hpp"

namespace {

using commvq::Index;

// Random combinations of a few waves, as in examples/c_quickstart.c.
std::vector<float> waves(std::mt19937& random, Index count, Index cols) {
  std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
  std::vector<float> rows(static_cast<std::size_t>(count * cols));
  for (Index t = 0; t < count; ++t)
    for (int wave = 1; wave <= 8; ++wave) {
      const float weight = uniform(random);
      for (Index c = 0; c < cols; ++c)
        rows[static_cast<std::size_t>(t * cols + c)] +=
            weight * std::sin(static_cast<float>(wave * (c + 1)));
    }
  return rows;
}

commvq::ModelCodecs learn(std::mt19937& random) {
  commvq::ModelCodecs codecs;
  codecs.rope.pairs.head_dim = codecs.rope.pairs.rotary_dim = 16;
  codecs.num_kv_heads = 2;
  codecs.model_digest = "waves";
  auto keys =
      commvq::KeyLearnerOptions::paper(commvq::KeyCodecConfig::paper_2bit(codecs.rope.pairs));
  keys.codec.codebook_size = 8;
  keys.codec.num_stages = 4;
  keys.max_steps = 3;
  commvq::ValueTrainerOptions values;
  values.codec = commvq::ValueCodecConfig::commvq_2bit(32);
  values.codec.hidden_size = 32;
  values.steps = 60;
  values.batch_tokens = 64;
  for (int layer = 0; layer < 2; ++layer) {
    const std::vector<float> rows = waves(random, 256, 32);
    codecs.layers.push_back({std::make_shared<commvq::KeyCodec>(
                                 commvq::learn_key_codec(commvq::as_matrix(rows, 256, 32), keys)),
                             std::make_shared<commvq::ValueCodec>(commvq::train_value_codec(
                                 commvq::as_matrix(rows, 256, 32), values))});
  }
  return codecs;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) return 2;
  std::mt19937 random(1);
  commvq::save_codecs(argv[1], learn(random));
  const commvq::ModelCodecs codecs = commvq::load_codecs(argv[1]);

  commvq::CacheConfig config;
  config.rope = codecs.rope;
  config.num_kv_heads = codecs.num_kv_heads;
  config.window = 16;
  commvq::LayerCache cache(config, codecs.layers[0]), exact(config, {});
  const std::vector<float> keys = waves(random, 400, 32), values = waves(random, 400, 32);
  const std::vector<float> query = waves(random, 1, 128);
  std::vector<float> output(128), expected(128);
  for (commvq::LayerCache* each : {&cache, &exact}) {
    each->append(commvq::as_matrix(keys, 400, 32), commvq::as_matrix(values, 400, 32));
    commvq::attend(*each, commvq::as_matrix(query, 1, 128), {},
                   commvq::as_matrix(each == &cache ? output : expected, 1, 128));
  }
  double error = 0, total = 0;
  for (std::size_t i = 0; i < 128; ++i) {
    error += std::pow(output[i] - expected[i], 2);
    total += std::pow(expected[i], 2);
  }
  error = std::sqrt(error / total);
  std::printf("%.1f bytes a token; relative error of attention %.3f\n", cache.bytes_per_token(),
              error);
  // An exception of the library is caught by its type on this side of a shared library.
  try {
    cache.truncate(401);
  } catch (const commvq::Error&) {
    return error > 0 && error < 0.3 ? 0 : 1;
  }
  return 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
