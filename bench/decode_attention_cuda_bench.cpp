// Times decode attention on the device, one layer in the shape of Llama-3.1-8B: 32 query heads, 8
// KV heads of 128, one query token, bf16. Codes and queries are random; several caches take turns,
// so that none is found in the second cache level. One line of JSON per case.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "commvq/core/error.hpp"
#include "commvq/core/float16.hpp"
#include "commvq/cuda/decode_attention.hpp"
#include "commvq/io/codebook_file.hpp"

#include <cuda_runtime_api.h>

namespace {

using namespace commvq;

constexpr int kNumQueryHeads = 32, kNumKvHeads = 8, kHeadDim = 128, kPageSize = 64, kWindow = 128;
constexpr Index kChannels = kNumKvHeads * kHeadDim;
constexpr Index kRotatedBytes = 256 << 20;
constexpr int kCallsPerGraph = 20, kReplays = 25;

void check(cudaError_t error) {
  require(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

template <class T>
std::shared_ptr<T> device_memory(std::size_t count) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, count * sizeof(T)));
  return {static_cast<T*>(memory), [](T* p) { cudaFree(p); }};
}
template <class T>
std::shared_ptr<T> to_device(const std::vector<T>& values) {
  auto memory = device_memory<T>(values.size());
  check(cudaMemcpy(memory.get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return memory;
}

using Rng = std::mt19937_64;

std::vector<float> normal_floats(Rng& rng, std::size_t count, float deviation) {
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = normal(rng);
  return values;
}

/// A shape of codes by name.
struct Preset {
  const char* name;
  int codebook_size, num_stages, value_bits;
  bool norm_per_head;
  bool value_blocks = false;  ///< one a head
  bool graded = false;
};
constexpr Preset kPresets[] = {
    {"paper_1bit", 64, 11, 1, false},           {"paper_2bit", 64, 21, 2, false},
    {"commvq_1bit", 64, 11, 1, true},           {"commvq_2bit", 64, 20, 2, true},
    {"binary_1bit", 2, 60, 1, true, true},      {"binary_2bit", 2, 124, 2, true, true},
    {"speed_1bit", 2, 60, 1, true, true, true}, {"speed_2bit", 2, 124, 2, true, true, true}};

LayerCodec random_codec(Rng& rng, const Preset& preset) {
  KeyCodecConfig config;
  config.codebook_size = preset.codebook_size;
  config.num_stages = preset.num_stages;
  config.tied = false;
  config.norm_per_head = preset.norm_per_head;
  config.graded = preset.graded;
  std::vector<KeyCodebook<float>> heads;
  for (int head = 0; head < kNumKvHeads; ++head) {
    KeyCodebook<float>& codebook = heads.emplace_back(config);
    codebook.rows = normal_floats(rng, codebook.rows.size(), 0.007f);
    if (config.graded) codebook.derive_graded_rows();
  }
  ValueCodecConfig values;
  values.num_channels = kChannels;
  values.bits = preset.value_bits;
  values.hidden_size = 1;
  values.num_blocks = preset.value_blocks ? kNumKvHeads : 1;
  values.graded = preset.graded;
  ValueCodecWeights weights;
  weights.norm_gain.assign(kChannels, 1.0f);
  weights.norm_bias.assign(kChannels, 0.0f);
  weights.hidden_weight.assign(kChannels, 0.0f);
  weights.hidden_bias.assign(static_cast<std::size_t>(values.num_blocks), 0.0f);
  weights.output_weight.assign(static_cast<std::size_t>(values.num_logits()), 0.0f);
  weights.output_bias.assign(static_cast<std::size_t>(values.num_logits()), 0.0f);
  weights.decoder = normal_floats(
      rng, static_cast<std::size_t>(values.num_code_bits() * kChannels / values.num_blocks), 1.0f);
  if (values.graded) weights.derive_graded_rows(kHeadDim);
  return {std::make_shared<KeyCodec>(std::move(heads)),
          std::make_shared<ValueCodec>(values, std::move(weights))};
}

/// `count` pages of random codes, tiled from a few hundred different ones.
std::shared_ptr<std::uint8_t> random_pages(Rng& rng, const cuda::DevicePageLayout& layout,
                                           Index count) {
  const Index kinds = std::min<Index>(count, 256);
  std::vector<std::uint8_t> pages(static_cast<std::size_t>(kinds * layout.page_bytes));
  for (std::size_t i = 0; i + 8 <= pages.size(); i += 8) {
    const std::uint64_t bits = rng();
    std::memcpy(&pages[i], &bits, 8);
  }
  for (Index page = 0; page < kinds; ++page)
    for (int slot = 0; slot < layout.page_size; ++slot) {
      const std::uint16_t norm = to_bf16(20.0f + static_cast<float>(rng() % 100) / 5);
      const std::uint16_t scale = to_bf16(0.5f + static_cast<float>(rng() % 100) / 100);
      std::uint8_t* const data = pages.data() + page * layout.page_bytes;
      for (int head = 0; head < layout.norms_per_token; ++head)
        std::memcpy(data + layout.key_norm(head, slot), &norm, 2);
      for (int block = 0; block < layout.value_blocks; ++block)
        std::memcpy(data + layout.value_scale(block, slot), &scale, 2);
    }
  auto memory = device_memory<std::uint8_t>(static_cast<std::size_t>(count * layout.page_bytes));
  for (Index first = 0; first < count; first += kinds)
    check(cudaMemcpy(memory.get() + first * layout.page_bytes, pages.data(),
                     static_cast<std::size_t>(std::min(kinds, count - first) * layout.page_bytes),
                     cudaMemcpyHostToDevice));
  return memory;
}

std::vector<std::uint16_t> bf16_bits(const std::vector<float>& values) {
  std::vector<std::uint16_t> bits;
  for (const float value : values) bits.push_back(to_bf16(value));
  return bits;
}

/// Median of the replays' times, divided by the calls of a graph, in microseconds.
template <class Enqueue>
double median_time(cudaStream_t stream, Enqueue enqueue) {
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < kCallsPerGraph; ++i) enqueue(i);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&replay, graph, 0));
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&stop));
  std::vector<float> times;
  for (int i = 0; i < kReplays + 3; ++i) {
    check(cudaEventRecord(start, stream));
    check(cudaGraphLaunch(replay, stream));
    check(cudaEventRecord(stop, stream));
    check(cudaEventSynchronize(stop));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start, stop));
    if (i >= 3) times.push_back(milliseconds * 1000 / kCallsPerGraph);
  }
  std::nth_element(times.begin(), times.begin() + kReplays / 2, times.end());
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  return times[kReplays / 2];
}

void run_case(const Preset& preset, int batch, int tokens) {
  Rng rng(1);
  RopeConfig rope;
  rope.theta = 500000.0;
  const cuda::DeviceCodebooks codebooks = cuda::prepare(random_codec(rng, preset), rope, kPageSize);
  const cuda::DevicePageLayout& layout = codebooks.layout();
  const int blocks = tokens / kPageSize;
  const Index pages_per_cache = Index{batch} * blocks;
  const Index cache_bytes = pages_per_cache * layout.page_bytes;
  const int num_caches =
      static_cast<int>(std::max<Index>(2, (kRotatedBytes + cache_bytes - 1) / cache_bytes));
  const auto pages = random_pages(rng, layout, pages_per_cache * num_caches);
  std::vector<std::shared_ptr<std::int32_t>> tables;
  for (int cache = 0; cache < num_caches; ++cache) {
    std::vector<std::int32_t> table(static_cast<std::size_t>(pages_per_cache));
    std::iota(table.begin(), table.end(), static_cast<std::int32_t>(cache * pages_per_cache));
    std::shuffle(table.begin(), table.end(), rng);
    tables.push_back(to_device(table));
  }
  const auto lengths =
      to_device(std::vector<std::int32_t>(static_cast<std::size_t>(batch), tokens));
  std::vector<std::int32_t> slot_numbers(static_cast<std::size_t>(batch));
  std::iota(slot_numbers.begin(), slot_numbers.end(), 0);
  const auto slots = to_device(slot_numbers);
  const std::size_t exact_size = static_cast<std::size_t>(batch * kWindow * kChannels);
  const auto exact_keys = to_device(bf16_bits(normal_floats(rng, exact_size, 1.0f)));
  const auto exact_values = to_device(bf16_bits(normal_floats(rng, exact_size, 1.0f)));
  const std::size_t query_size = static_cast<std::size_t>(batch * kNumQueryHeads * kHeadDim);
  const auto queries = to_device(bf16_bits(normal_floats(rng, query_size, 1.0f)));
  const auto output = device_memory<std::uint16_t>(query_size);

  cuda::DecodeAttention call;
  call.queries = queries.get();
  call.output = output.get();
  call.pages = {pages.get(), layout.page_bytes};
  call.max_blocks = blocks;
  call.seq_lens = lengths.get();
  call.exact.keys = exact_keys.get();
  call.exact.values = exact_values.get();
  call.exact.capacity = kWindow;
  call.exact_slots = slots.get();
  call.window = kWindow;
  call.limits = {batch, 1, kNumQueryHeads, Index{batch} * tokens};
  call.workspace_bytes = cuda::decode_workspace_size(codebooks, call.limits);
  const auto workspace = device_memory<std::uint8_t>(call.workspace_bytes);
  call.workspace = workspace.get();
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  call.stream = stream;
  const double time = median_time(stream, [&](int i) {
    call.block_table = tables[static_cast<std::size_t>(i % num_caches)].get();
    const cuda::Status status = cuda::decode_attention(codebooks, call);
    require(status.ok(), status.message());
  });
  check(cudaStreamDestroy(stream));
  std::printf(
      "{\"preset\": \"%s\", \"stages\": %d, \"batch\": %d, \"tokens\": %d, \"microseconds\": %.2f, "
      "\"cache_bytes_per_token\": %.3f, \"workspace_bytes\": %zu}\n",
      preset.name, preset.num_stages, batch, tokens, time, layout.bytes_per_token(),
      call.workspace_bytes);
  std::fflush(stdout);
}

}  // namespace

/// Arguments: preset, batch, tokens and, if they are not the preset's, stages of the keys; without
/// any, the cases of bench/README.md.
int main(int argc, char** argv) {
  try {
    if (argc == 4 || argc == 5) {
      for (Preset preset : kPresets)
        if (argv[1] == std::string(preset.name)) {
          if (argc == 5) preset.num_stages = std::stoi(argv[4]);
          run_case(preset, std::stoi(argv[2]), std::stoi(argv[3]));
          return 0;
        }
      fail("no preset is called ", argv[1]);
    }
    require(argc == 1, "give PRESET BATCH TOKENS [STAGES], or nothing");
    for (const Preset& preset : kPresets) {
      run_case(preset, 1, 8192);
      run_case(preset, 1, 32768);
      run_case(preset, 1, 131072);
      run_case(preset, 16, 32768);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
