#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "commvq/cache/cache.hpp"

#include "engine/model_config.hpp"
#include "engine/model_weights.hpp"
#include "engine/sequence_cache.hpp"

namespace engine {

/// New tokens of one sequence and the cache that holds what came before.
struct Segment {
  std::span<const int> tokens;
  CacheHandle cache;
};

/// What one layer computed for the tokens of a `forward`, before RoPE and after biases and norms:
/// queries `[tokens][num_q_heads * head_dim]`, keys and values `[tokens][num_kv_heads * head_dim]`.
using LayerObserver =
    std::function<void(int layer, MatrixView<const float> queries, MatrixView<const float> keys,
                       MatrixView<const float> values)>;

/// Whose logits `forward` computes.
enum class Logits { kNone, kLastOfSegment, kAll };

/// A Llama, Mistral or Qwen model in FP32 on the CPU.
class Model {
 public:
  /// Loads a Hugging Face folder: config.json and safetensors weights (BF16, F16 or F32). Throws
  /// `commvq::Error` for what is missing, misshapen or of another family.
  explicit Model(const std::filesystem::path& folder);

  const ModelConfig& config() const { return config_; }
  /// Hash of the configuration and of the key and value projections: names the model in a codebook
  /// file.
  const std::string& digest() const { return weights_.digest; }

  /// A cache for one sequence: with `codecs` (one a layer), or exact where it is empty.
  commvq::Cache make_cache(std::vector<commvq::LayerCodec> codecs, Index window = 128,
                           Index sinks = 0,
                           commvq::FloatType exact_type = commvq::FloatType::kFp16) const;

  /// Appends the tokens of every segment to its cache and runs the model on them, all in one pass.
  /// Returns logits `[rows][vocab_size]`: none, the last token's of each segment, or every token's.
  /// Throws `commvq::Error` for a token outside the vocabulary or an empty segment.
  std::vector<float> forward(std::span<const Segment> segments, Logits logits,
                             const LayerObserver& observer = {}) const;

  /// One sequence, its tokens in chunks, so that attention and exact copies stay small.
  std::vector<float> prefill(std::span<const int> tokens, CacheHandle cache, Logits logits,
                             const LayerObserver& observer = {}) const;

  /// Tokens that `prefill` runs at a time.
  static constexpr Index kChunkTokens = 256;

 private:
  ModelConfig config_;
  ModelWeights weights_;
};

}  // namespace engine
