// Generation with the cache and attention on the device, on the model that comes with the project.
#include <memory>

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

TEST_F(DeviceGeneration, WritesTheTokensThatTheCpuWrites) {
  const Model model(small_model());
  const std::vector<commvq::LayerCodec> codecs = learn_briefly(model);
  for (const int sinks : {0, 4}) {
    constexpr int kTokens = 120, kWindow = 32;
    const auto device_cache = make_device_cache(model.config(), codecs, 200, kWindow, sinks);
    commvq::Cache cache = model.make_cache(codecs, kWindow, sinks);
    const std::vector<int> on_device = write(model, *device_cache, kTokens);
    EXPECT_EQ(on_device, write(model, cache, kTokens)) << sinks << " sinks";
    EXPECT_EQ(device_cache->length(), cache.length());
    EXPECT_GT(cache.layer(0).coded_end(), 64);
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
