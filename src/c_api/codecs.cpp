#include "c_api/guard.hpp"
#include "c_api/handles.hpp"
#include "c_api/structs.hpp"

using namespace commvq;
using namespace commvq::c_api;

namespace {

commvq_model describe(const ModelCodecs& codecs) {
  const RopeConfig& rope = codecs.rope;
  commvq_model model{};
  model.num_layers = static_cast<std::int32_t>(codecs.layers.size());
  model.num_kv_heads = codecs.num_kv_heads;
  model.head_dim = rope.pairs.head_dim;
  model.rotary_dim = rope.pairs.rotary_dim;
  model.rope_layout = rope.pairs.layout == RopeLayout::kHalfSplit ? COMMVQ_ROPE_HALF_SPLIT
                                                                  : COMMVQ_ROPE_INTERLEAVED;
  model.rope_scaling = static_cast<std::int32_t>(rope.scaling);
  model.rope_theta = rope.theta;
  model.rope_factor = rope.factor;
  model.rope_low_freq_factor = rope.low_freq_factor;
  model.rope_high_freq_factor = rope.high_freq_factor;
  model.rope_original_max_position = rope.original_max_position;
  model.digest = codecs.model_digest.c_str();
  return model;
}

static_assert(static_cast<int>(RopeScaling::kNone) == COMMVQ_ROPE_UNSCALED);
static_assert(static_cast<int>(RopeScaling::kLinear) == COMMVQ_ROPE_LINEAR);
static_assert(static_cast<int>(RopeScaling::kLlama3) == COMMVQ_ROPE_LLAMA3);

/// The rotation of a model. Factors that its scaling does not use keep their defaults, as in a
/// codebook file.
RopeConfig rope_of(const commvq_model& model) {
  require(
      model.rope_layout == COMMVQ_ROPE_HALF_SPLIT || model.rope_layout == COMMVQ_ROPE_INTERLEAVED,
      "rope_layout is ", model.rope_layout, "; it must be 0 (half-split) or 1 (interleaved)");
  require(model.rope_scaling >= COMMVQ_ROPE_UNSCALED && model.rope_scaling <= COMMVQ_ROPE_LLAMA3,
          "rope_scaling is ", model.rope_scaling,
          "; it must be 0 (unscaled), 1 (linear) or 2 (Llama 3)");
  RopeConfig rope;
  rope.pairs.head_dim = model.head_dim;
  rope.pairs.rotary_dim = model.rotary_dim;
  rope.pairs.layout = model.rope_layout == COMMVQ_ROPE_HALF_SPLIT ? RopeLayout::kHalfSplit
                                                                  : RopeLayout::kInterleaved;
  rope.theta = model.rope_theta;
  rope.scaling = static_cast<RopeScaling>(model.rope_scaling);
  if (rope.scaling != RopeScaling::kNone) rope.factor = model.rope_factor;
  if (rope.scaling == RopeScaling::kLlama3) {
    rope.low_freq_factor = model.rope_low_freq_factor;
    rope.high_freq_factor = model.rope_high_freq_factor;
    rope.original_max_position = model.rope_original_max_position;
  }
  rope.validate();
  return rope;
}

}  // namespace

commvq_status commvq_codecs_load(const char* path, commvq_codecs** codecs) {
  return guarded([&] {
    const char* const name = &deref(path, "path");
    commvq_codecs*& result = deref(codecs, "codecs");
    result = new commvq_codecs{with_status(COMMVQ_BAD_FILE, [&] { return load_codecs(name); })};
  });
}

void commvq_codecs_destroy(commvq_codecs* codecs) {
  delete codecs;
}

commvq_status commvq_codecs_describe(const commvq_codecs* codecs, commvq_model* model) {
  return guarded([&] {
    const ModelCodecs& ours = deref(codecs, "codecs").codecs;
    write_struct(model, deref(model, "model").struct_size, describe(ours), "commvq_model");
  });
}

commvq_status commvq_codecs_require_model(const commvq_codecs* codecs, const commvq_model* model) {
  return guarded([&] {
    const ModelCodecs& ours = deref(codecs, "codecs").codecs;
    const commvq_model theirs = read_struct(model, commvq_model{}, "commvq_model");
    const std::string digest = &deref(theirs.digest, "commvq_model::digest");
    const RopeConfig rope = rope_of(theirs);
    with_status(COMMVQ_WRONG_MODEL,
                [&] { ours.require_model(rope, theirs.num_kv_heads, theirs.num_layers, digest); });
  });
}
