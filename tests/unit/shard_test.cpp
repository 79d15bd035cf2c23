#include "commvq/io/shard.hpp"

#include <cmath>

#include "commvq/attention/attention.hpp"

#include <gmock/gmock.h>

#include "reference/random_cache.hpp"

namespace commvq {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

constexpr int kHeads = 4, kHeadDim = 16;

ModelCodecs random_codecs(testing_support::Rng& rng, bool norm_per_head) {
  KeyCodecConfig config;
  config.pairs = {kHeadDim, kHeadDim, RopeLayout::kHalfSplit};
  config.group_pairs = 4;
  config.codebook_size = 8;
  config.num_stages = 3;
  config.tied = false;
  config.beam_width = 2;
  config.norm_per_head = norm_per_head;
  ModelCodecs codecs;
  codecs.rope.pairs = config.pairs;
  codecs.num_kv_heads = kHeads;
  codecs.model_digest = "model";
  codecs.layers = {{testing_support::random_key_codec(rng, config, kHeads),
                    testing_support::random_value_codec(rng, kHeads * kHeadDim, 1, 10, kHeads)},
                   {nullptr, nullptr}};
  return codecs;
}

/// Attention outputs `[tokens][2 * heads * kHeadDim]` of a sequence given in two parts.
std::vector<float> run(const ModelCodecs& codecs, MatrixView<const float> queries,
                       MatrixView<const float> keys, MatrixView<const float> values) {
  CacheConfig config;
  config.rope = codecs.rope;
  config.num_kv_heads = codecs.num_kv_heads;
  config.window = 8;
  LayerCache cache(config, codecs.layers[0]);
  std::vector<float> output(static_cast<std::size_t>(queries.rows * queries.cols));
  for (const Index first : {Index{0}, queries.rows - 5}) {
    const Index count = first == 0 ? queries.rows - 5 : 5;
    cache.append(keys.middle_rows(first, count), values.middle_rows(first, count));
    attend(cache, queries.middle_rows(first, count), {},
           {output.data() + first * queries.cols, count, queries.cols});
  }
  return output;
}

TEST(Shard, RanksTogetherGiveWhatOneGives) {
  testing_support::Rng rng(4);
  const ModelCodecs codecs = random_codecs(rng, /*norm_per_head=*/true);
  constexpr Index kTokens = 60, kKv = kHeads * kHeadDim, kQ = 2 * kKv;
  const std::vector<float> queries = testing_support::normal_floats(rng, kTokens * kQ);
  const std::vector<float> keys = testing_support::normal_floats(rng, kTokens * kKv);
  const std::vector<float> values = testing_support::normal_floats(rng, kTokens * kKv);
  const MatrixView<const float> q(queries.data(), kTokens, kQ), k(keys.data(), kTokens, kKv),
      v(values.data(), kTokens, kKv);
  const std::vector<float> whole = run(codecs, q, k, v);
  for (const int num_ranks : {1, 2, 4})
    for (int rank = 0; rank < num_ranks; ++rank) {
      const ModelCodecs part = shard(codecs, rank, num_ranks);
      EXPECT_EQ(part.num_kv_heads, kHeads / num_ranks);
      EXPECT_EQ(part.model_digest, "model");
      EXPECT_EQ(part.layers.size(), 2u);
      EXPECT_EQ(part.layers[0].values->config().num_blocks, kHeads / num_ranks);
      const Index kv = kKv / num_ranks, width = kQ / num_ranks;
      const std::vector<float> output =
          run(part, q.middle_cols(rank * width, width), k.middle_cols(rank * kv, kv),
              v.middle_cols(rank * kv, kv));
      for (Index t = 0; t < kTokens; ++t)
        for (Index c = 0; c < width; ++c)
          ASSERT_EQ(output[static_cast<std::size_t>(t * width + c)],
                    whole[static_cast<std::size_t>(t * kQ + rank * width + c)])
              << "rank " << rank << " of " << num_ranks << ", token " << t << ", channel " << c;
    }
}

TEST(Shard, CodecsThatCoupleHeadsAreRefused) {
  testing_support::Rng rng(5);
  const ModelCodecs one_norm = random_codecs(rng, /*norm_per_head=*/false);
  EXPECT_THAT([&] { shard(one_norm, 0, 2); },
              ThrowsMessage<Error>(AllOf(HasSubstr("key codec of layer 0"), HasSubstr("one norm"),
                                         HasSubstr("--ranks N"))));
  EXPECT_EQ(shard(one_norm, 0, 1).num_kv_heads, kHeads);
  ModelCodecs values = random_codecs(rng, /*norm_per_head=*/true);
  for (const int blocks : {1, 2}) {
    values.layers[1].values =
        testing_support::random_value_codec(rng, kHeads * kHeadDim, 1, 10, blocks);
    EXPECT_THAT([&] { shard(values, 0, 4); },
                ThrowsMessage<Error>(
                    AllOf(HasSubstr("value codec of layer 1"), HasSubstr("4 KV heads"),
                          HasSubstr("num_blocks a multiple of 4"), HasSubstr("--ranks N"))));
  }
  EXPECT_EQ(shard(values, 1, 2).layers[1].values->config().num_blocks, 1);
}

TEST(Shard, RanksMustFit) {
  testing_support::Rng rng(6);
  const ModelCodecs codecs = random_codecs(rng, /*norm_per_head=*/true);
  for (const int num_ranks : {0, 3, 8})
    EXPECT_THAT([&] { shard(codecs, 0, num_ranks); },
                ThrowsMessage<Error>(HasSubstr("num_ranks is " + std::to_string(num_ranks))));
  for (const int rank : {-1, 2})
    EXPECT_THAT([&] { shard(codecs, rank, 2); },
                ThrowsMessage<Error>(HasSubstr("rank is " + std::to_string(rank))));
}

}  // namespace
}  // namespace commvq
