#include "commvq/attention/attention.hpp"

#include <limits>

#include <gmock/gmock.h>
#include <omp.h>

#include "reference/random_cache.hpp"

namespace commvq {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing_support::append_random;
using testing_support::normal_floats;
using testing_support::random_key_codec;
using testing_support::random_value_codec;
using testing_support::Rng;

constexpr Index kQueryChannels = 64;  // two query heads for each of two KV heads of 16

LayerCache make_cache(Index tokens) {
  Rng rng(1);
  CacheConfig config;
  config.rope.pairs.head_dim = config.rope.pairs.rotary_dim = 16;
  config.num_kv_heads = 2;
  config.window = 32;
  LayerCache cache(config, {random_key_codec(rng, KeyCodecConfig::paper_2bit(config.rope.pairs), 2),
                            random_value_codec(rng, 32, 1, 16)});
  for (Index done = 0; done < tokens; done += 100)
    append_random(cache, rng, std::min(Index{100}, tokens - done));
  return cache;
}

std::string error_of(const LayerCache& cache, const std::vector<float>& queries, Index rows,
                     const AttentionOptions& options = {}, Index output_rows = -1) {
  std::vector<float> output(queries.size());
  const Index cols = static_cast<Index>(queries.size()) / rows;
  if (output_rows < 0) output_rows = rows;
  try {
    attend(cache, as_matrix(queries, rows, cols), options,
           {output.data(), output_rows, static_cast<Index>(output.size()) / output_rows});
    return "(no error)";
  } catch (const Error& error) {
    return error.what();
  }
}

TEST(Attend, RefusesAnEmptyCache) {
  Rng rng(2);
  EXPECT_THAT(error_of(make_cache(0), normal_floats(rng, kQueryChannels), 1),
              HasSubstr("1 queries on a cache of 0 tokens"));
}

TEST(Attend, RefusesQueriesThatAreNotThere) {
  Rng rng(3);
  LayerCache cache = make_cache(0);
  append_random(cache, rng, 5);
  EXPECT_EQ(error_of(cache, normal_floats(rng, 5 * kQueryChannels), 5), "(no error)");
  EXPECT_THAT(error_of(cache, normal_floats(rng, 6 * kQueryChannels), 6),
              HasSubstr("6 queries on a cache of 5 tokens"));
  EXPECT_THAT(error_of(make_cache(500), normal_floats(rng, 300 * kQueryChannels), 300),
              AllOf(HasSubstr("position 200"), HasSubstr("attend after each append")));
}

TEST(Attend, RefusesShapesThatDoNotFit) {
  Rng rng(4);
  const LayerCache cache = make_cache(50);
  EXPECT_THAT(error_of(cache, normal_floats(rng, 48), 1),
              AllOf(HasSubstr("48 channels"), HasSubstr("2 * 16")));
  EXPECT_THAT(error_of(cache, normal_floats(rng, 2 * kQueryChannels), 2, {}, 1),
              AllOf(HasSubstr("[1, 128]"), HasSubstr("[2, 64]")));
}

TEST(Attend, NamesTheQueryThatIsNotFinite) {
  Rng rng(5);
  const LayerCache cache = make_cache(50);
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    std::vector<float> queries = normal_floats(rng, 2 * kQueryChannels);
    queries[kQueryChannels + 7] = bad;
    EXPECT_THAT(error_of(cache, queries, 2), HasSubstr("query 1, channel 7"));
  }
}

TEST(Attend, NamesTheOptionThatIsOutOfRange) {
  Rng rng(6);
  const LayerCache cache = make_cache(50);
  const auto refuses = [&](auto change, const char* name) {
    AttentionOptions options;
    change(options);
    EXPECT_THAT(error_of(cache, normal_floats(rng, kQueryChannels), 1, options), HasSubstr(name));
  };
  refuses([](auto& o) { o.scale = std::numeric_limits<float>::infinity(); }, "scale");
  refuses([](auto& o) { o.sliding_window = -1; }, "sliding_window");
  refuses([](auto& o) { o.soft_cap = -1.0f; }, "soft_cap");
}

TEST(Attend, DoesNotDependOnTheNumberOfThreads) {
  Rng rng(7);
  const LayerCache cache = make_cache(5000);
  const Index rows = 3;
  const std::vector<float> queries = normal_floats(rng, rows * kQueryChannels);
  const auto attend_with = [&](int threads) {
    omp_set_num_threads(threads);
    std::vector<float> output(queries.size());
    attend(cache, as_matrix(queries, rows, kQueryChannels), {},
           as_matrix(output, rows, kQueryChannels));
    return output;
  };
  const int before = omp_get_max_threads();
  const std::vector<float> one = attend_with(1);
  EXPECT_EQ(attend_with(2), one);
  EXPECT_EQ(attend_with(5), one);
  omp_set_num_threads(before);
}

}  // namespace
}  // namespace commvq
