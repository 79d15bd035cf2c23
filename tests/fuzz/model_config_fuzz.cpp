// config.json of a model: the shape of a Llama and its RoPE, in both layouts.
#include <cmath>

#include "commvq/rope/rope.hpp"

#include "engine/model_config.hpp"
#include "fuzz/harness.hpp"
#include "fuzz/input_file.hpp"

namespace {

using namespace commvq;

/// Of the file: its text three times, JSON values of the shortest entries.
constexpr std::size_t kMemoryMultiple = 64;

void check_rope(const RopeConfig& config) {
  const Rope rope(config);
  std::vector<float> rotation(static_cast<std::size_t>(config.pairs.head_dim));
  for (const Index position : {Index{0}, Index{1} << 40}) {
    rope.rotation_at(position, rotation.data());
    for (const float part : rotation)
      fuzz::demand(std::abs(part) <= 1.0f, "a rotation that is none");
  }
}

void check(const engine::ModelConfig& config) {
  fuzz::demand(config.num_q_heads >= config.num_kv_heads && config.num_layers >= 1 &&
                   config.vocab_size >= 1 && config.q_size() >= config.head_dim() &&
                   config.kv_size() >= config.head_dim(),
               "a model without heads, layers or vocabulary");
  fuzz::demand(std::isfinite(config.rms_norm_eps) && config.rms_norm_eps >= 0,
               "an rms_norm_eps that makes NaN");
  check_rope(config.rope);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const fuzz::InputFile file("config.json");
  file.write({data, size});
  fuzz::accepts(size, kMemoryMultiple, [] { check(engine::load_model_config(file.folder())); });
  const std::string text(reinterpret_cast<const char*>(data), size);
  fuzz::accepts(size, kMemoryMultiple,
                [&] { check_rope(parse_hf_rope(text, RopeLayout::kInterleaved)); });
  return 0;
}
