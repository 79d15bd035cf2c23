#pragma once

#include <memory>
#include <vector>

#include "commvq/io/codebook_file.hpp"
#include "commvq/learner/key_learner.hpp"
#include "commvq/learner/value_trainer.hpp"

#include "engine/generate.hpp"
#include "reference/instrumented.hpp"

namespace commvq::testing_support {

/// Keys and values of every layer over text that the model wrote itself.
struct Calibration {
  Index tokens = 0;
  std::vector<std::vector<float>> keys, values;
};

inline Calibration collect(const engine::Model& model, const std::vector<int>& text) {
  Calibration data;
  data.tokens = static_cast<Index>(text.size());
  data.keys.resize(static_cast<std::size_t>(model.config().num_layers));
  data.values.resize(data.keys.size());
  Cache cache = model.make_cache({});
  model.prefill(text, cache, engine::Logits::kNone, [&](int layer, auto, auto k, auto v) {
    const auto i = static_cast<std::size_t>(layer);
    for (Index t = 0; t < k.rows; ++t) {
      data.keys[i].insert(data.keys[i].end(), k.row(t), k.row(t) + k.cols);
      data.values[i].insert(data.values[i].end(), v.row(t), v.row(t) + v.cols);
    }
  });
  return data;
}

/// Codecs in the paper's 1-bit format, learnt briefly: the tests are about equality, not quality.
inline std::vector<LayerCodec> learn_briefly(const engine::Model& model) {
  const auto text = engine::write_text(model, {{0}}, repeats(600, 150), 1)[0];
  const Calibration data = collect(model, text);
  const Index channels = model.config().kv_size();
  KeyLearnerOptions keys;
  keys.codec = KeyCodecConfig::paper_1bit(model.config().rope.pairs);
  keys.max_steps = repeats(3, 1);
  ValueTrainerOptions values;
  values.codec = {static_cast<int>(channels), 1, 64};
  values.steps = repeats(40, 10);
  values.batch_tokens = 64;
  std::vector<LayerCodec> codecs;
  for (std::size_t i = 0; i < data.keys.size(); ++i)
    codecs.push_back({std::make_shared<KeyCodec>(
                          learn_key_codec(as_matrix(data.keys[i], data.tokens, channels), keys)),
                      std::make_shared<ValueCodec>(train_value_codec(
                          as_matrix(data.values[i], data.tokens, channels), values))});
  return codecs;
}

}  // namespace commvq::testing_support
