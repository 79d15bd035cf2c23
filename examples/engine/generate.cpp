#include "engine/generate.hpp"

#include <algorithm>

#include "commvq/core/error.hpp"

namespace engine {

std::vector<int> generate(const Model& model, CacheHandle cache, std::span<const int> prompt,
                          int max_tokens, Sampler& sampler, std::span<const int> stop_tokens,
                          const TokenCallback& on_token) {
  commvq::require(!prompt.empty(), "the prompt has no tokens");
  std::vector<int> result;
  if (max_tokens <= 0) return result;
  std::vector<float> logits = model.prefill(prompt, cache, Logits::kLastOfSegment);
  while (true) {
    const int token = sampler.pick(logits);
    result.push_back(token);
    const bool goes_on = !on_token || on_token(token);
    const bool ends = std::find(stop_tokens.begin(), stop_tokens.end(), token) != stop_tokens.end();
    if (!goes_on || ends || static_cast<int>(result.size()) >= max_tokens) return result;
    const Segment segment{{&token, 1}, cache};
    logits = model.forward({&segment, 1}, Logits::kLastOfSegment);
  }
}

std::vector<std::vector<int>> write_text(const Model& model, std::vector<std::vector<int>> texts,
                                         int length, std::uint64_t seed,
                                         const std::function<void(int)>& progress) {
  commvq::require(!texts.empty(), "there are no texts to go on with");
  const std::size_t begun = texts[0].size();
  for (const auto& text : texts)
    commvq::require(!text.empty() && text.size() == begun, "texts begin with ", text.size(),
                    " and ", begun, " tokens; all must begin with as many, at least 1");
  std::vector<commvq::Cache> caches(texts.size(), model.make_cache({}));
  std::vector<Sampler> samplers;
  for (std::size_t i = 0; i < texts.size(); ++i)
    samplers.emplace_back(SamplerOptions{.temperature = 1.0, .seed = seed * 1000003 + i});

  const auto vocab = static_cast<std::size_t>(model.config().vocab_size);
  std::size_t cached = 0;
  for (int written = static_cast<int>(begun); written < length; ++written) {
    std::vector<Segment> segments;
    for (std::size_t i = 0; i < texts.size(); ++i)
      segments.push_back({std::span<const int>(texts[i]).subspan(cached), &caches[i]});
    const std::vector<float> logits = model.forward(segments, Logits::kLastOfSegment);
    cached = texts[0].size();
    for (std::size_t i = 0; i < texts.size(); ++i)
      texts[i].push_back(samplers[i].pick(std::span(logits).subspan(i * vocab, vocab)));
    if (progress) progress(written + 1);
  }
  return texts;
}

}  // namespace engine
