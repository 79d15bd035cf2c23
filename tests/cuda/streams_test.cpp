// Many threads, each with a stream of its own, with one set of codebooks: each gets, byte for byte,
// what it gets alone.
#include <deque>
#include <thread>

#include "commvq/cuda/append.hpp"

#include "cuda/decode_case.hpp"
#include "reference/append_reference.hpp"

namespace commvq::cuda::testing_support {
namespace {

using commvq::testing_support::AppendCase;
using commvq::testing_support::check_cuda;

constexpr int kThreads = 6;
constexpr int kRounds = 30;  // of each thread, enqueued without waiting

/// A caller has `enqueue(stream)`, `clear()` and `results()`. Compares the results of each alone
/// with those of all at the same time.
template <class Caller>
void expect_the_same_together(std::deque<Caller>& callers) {
  std::vector<decltype(callers[0].results())> alone;
  for (Caller& caller : callers) {
    const Status status = caller.enqueue(nullptr);
    ASSERT_TRUE(status.ok()) << status.message();
    alone.push_back(caller.results());
    caller.clear();
  }
  check_cuda(cudaDeviceSynchronize(), "clearing");
  std::vector<std::thread> threads;
  for (Caller& caller : callers)
    threads.emplace_back([&caller] {
      cudaStream_t stream = nullptr;
      EXPECT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
      for (int round = 0; round < kRounds; ++round) {
        const Status status = caller.enqueue(stream);
        EXPECT_TRUE(status.ok()) << status.message();
      }
      EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
      EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
    });
  for (std::thread& thread : threads) thread.join();
  for (std::size_t i = 0; i < callers.size(); ++i)
    EXPECT_EQ(callers[i].results(), alone[i]) << "caller " << i;
}

/// Attends over pages that others read too, with lengths, output and workspace of its own.
struct Decoder {
  const DeviceCodebooks& codebooks;
  DecodeAttention call;
  DeviceArray<std::int32_t> lengths;
  DeviceArray<std::uint16_t> output;
  DeviceArray<std::uint8_t> workspace;

  Decoder(DecodeSetup& setup, const std::vector<std::int32_t>& own_lengths)
      : codebooks(setup.codebooks()),
        call(setup.call()),
        lengths(own_lengths),
        output(setup.output_size()),
        workspace(call.workspace_bytes) {
    call.seq_lens = lengths.get();
    call.output = output.get();
    call.lse = nullptr;
    call.workspace = workspace.get();
    clear();
  }
  Status enqueue(cudaStream_t stream) {
    call.stream = stream;
    return decode_attention(codebooks, call);
  }
  void clear() {
    output.fill(0xff);
    workspace.fill(0xff);
  }
  std::vector<std::uint16_t> results() const { return output.to_host(); }
};

void decode_together(const DecodeCase& c) {
  DecodeSetup setup(c);
  std::deque<Decoder> callers;
  for (int i = 0; i < kThreads; ++i) {
    std::vector<std::int32_t> lengths;
    for (const int length : c.lengths) lengths.push_back(length - 37 * i);
    callers.emplace_back(setup, lengths);
  }
  expect_the_same_together(callers);
}

TEST(Streams, DecodeWithTheSameCodebooksAndPages) {
  COMMVQ_NEEDS_DEVICE();
  DecodeCase c;
  c.name = "streams";
  c.keys = key_config(128, 64, 64, 11);
  c.lengths = {1200, 300, 900};
  c.spare = 2000;  // exact rows of all tokens, so that shorter lengths keep their windows
  decode_together(c);
  c.keys = key_config(128, 64, 2, 60);
  c.keys.norm_per_head = true;
  c.value_blocks = c.num_kv_heads;
  decode_together(c);
}

/// Codes so many of the same tokens into pages of its own.
struct Appender {
  const DeviceEncoder& encoder;
  const AppendCase& tested;
  DeviceArray<std::uint8_t> pages, workspace;
  AppendParams params;

  Appender(const DeviceEncoder& shared, const AppendCase& tokens, const AppendParams& inputs,
           Index num_tokens)
      : encoder(shared),
        tested(tokens),
        pages(tokens.noise),
        workspace(append_workspace_size(shared, num_tokens)),
        params(inputs) {
    params.num_tokens = num_tokens;
    params.pages = {pages.get(), tested.layout.page_bytes};
    params.workspace = workspace.get();
    params.workspace_bytes = workspace.size();
  }
  Status enqueue(cudaStream_t stream) {
    params.stream = stream;
    return append(encoder, params);
  }
  void clear() {
    pages.copy(tested.noise);
    workspace.fill(0xff);
  }
  std::vector<std::uint8_t> results() const { return pages.to_host(); }
};

TEST(Streams, AppendWithTheSameEncoder) {
  COMMVQ_NEEDS_DEVICE();
  Rng rng(23);
  for (const int beam_width : {1, 4}) {
    SCOPED_TRACE(beam_width);
    const AppendCase tested = AppendCase::random(rng, {.num_kv_heads = 2,
                                                       .head_dim = 128,
                                                       .num_tokens = 200,
                                                       .codebook_size = 64,
                                                       .num_stages = 11,
                                                       .beam_width = beam_width});
    const DeviceEncoder encoder = prepare_encoder(tested.codec, tested.layout);
    const DeviceArray<float> keys(tested.keys), values(tested.values);
    const DeviceArray<std::int64_t> slot_mapping(tested.slot_mapping);
    AppendParams inputs;
    inputs.keys = keys.get();
    inputs.values = values.get();
    inputs.type = FloatType::kFp32;
    inputs.slot_mapping = slot_mapping.get();
    std::deque<Appender> callers;
    for (int i = 0; i < kThreads; ++i)
      callers.emplace_back(encoder, tested, inputs, tested.num_tokens - 23 * i);
    expect_the_same_together(callers);
  }
}

}  // namespace
}  // namespace commvq::cuda::testing_support
