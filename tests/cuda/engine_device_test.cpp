// Generation with the cache and attention on the device, on the model that comes with the project.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <span>

#include <gmock/gmock.h>

#include "cuda/device.hpp"
#include "engine/device_cache.hpp"
#include "engine/generate.hpp"
#include "engine/tokenizer.hpp"
#include "reference/brief_codecs.hpp"
#include "reference/example_data.hpp"

namespace engine {
namespace {

using commvq::testing_support::learn_briefly;
using commvq::testing_support::small_model;
using testing::HasSubstr;
using testing::ThrowsMessage;

class DeviceGeneration : public testing::Test {
 protected:
  void SetUp() override { COMMVQ_NEEDS_DEVICE(); }

  static std::vector<int> write(const Model& model, CacheHandle cache, int count) {
    const Tokenizer tokenizer(small_model() / "tokenizer.json");
    Sampler greedy({.temperature = 0});
    return generate(model, cache, tokenizer.encode("The history of the city begins"), count,
                    greedy);
  }
};

/// Index of the largest element.
int largest(std::span<const float> row) {
  return static_cast<int>(std::max_element(row.begin(), row.end()) - row.begin());
}

// The device keeps codebooks as integers and works in fp16: where two tokens are as good as equally
// probable it may choose the other one. Both caches are shown the same text.
TEST_F(DeviceGeneration, PrefersTheTokensThatTheCpuPrefers) {
  const Model model(small_model());
  const std::vector<commvq::LayerCodec> codecs = learn_briefly(model);
  const auto vocab = static_cast<std::size_t>(model.config().vocab_size);
  constexpr int kWindow = 32;
  for (const int sinks : {0, 4}) {
    commvq::Cache cache = model.make_cache(codecs, kWindow, sinks);
    const std::vector<int> text = write(model, cache, 160);
    EXPECT_GT(cache.layer(0).coded_end(), 96);
    cache.clear();
    const auto device_cache = make_device_cache(model.config(), codecs, 200, kWindow, sinks);
    const std::vector<float> on_cpu = model.prefill(text, cache, Logits::kAll);
    const std::vector<float> on_device = model.prefill(text, *device_cache, Logits::kAll);
    EXPECT_EQ(device_cache->length(), cache.length());

    int others = 0;
    double worst_margin = 0, error = 0, energy = 0;
    for (std::size_t first = 0; first < on_cpu.size(); first += vocab) {
      const auto cpu = std::span(on_cpu).subspan(first, vocab);
      const auto device = std::span(on_device).subspan(first, vocab);
      const int choice = largest(cpu), device_choice = largest(device);
      others += choice != device_choice;
      worst_margin =
          std::max<double>(worst_margin, cpu[static_cast<std::size_t>(choice)] -
                                             cpu[static_cast<std::size_t>(device_choice)]);
      for (std::size_t i = 0; i < vocab; ++i) {
        error += (cpu[i] - device[i]) * (cpu[i] - device[i]);
        energy += cpu[i] * cpu[i];
      }
    }
    std::printf("  %d sinks: %d of %zu choices differ, by at most %.4f; logits differ by %.4f\n",
                sinks, others, text.size(), worst_margin, std::sqrt(error / energy));
    EXPECT_LE(others, static_cast<int>(text.size()) / 20) << sinks << " sinks";
    EXPECT_LT(std::sqrt(error / energy), 0.03) << sinks << " sinks";
  }
}

TEST_F(DeviceGeneration, RefusesMoreTokensThanItHasMemoryFor) {
  const Model model(small_model());
  const auto cache = make_device_cache(model.config(), learn_briefly(model), 20);
  EXPECT_THAT([&] { write(model, *cache, 60); },
              ThrowsMessage<commvq::Error>(HasSubstr("the device cache was made for 20")));
}

}  // namespace
}  // namespace engine
