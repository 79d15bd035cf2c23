// What `append` takes: one layer of Llama-3.1-8B (8 KV heads of 128), random codecs of the presets'
// shapes. Median over many calls, each a captured graph timed by events; inputs, pages and
// workspaces take turns, at 8192 tokens a call together more than twice the L2 cache. The last line
// is JSON.
//
//     append_cuda_bench [tokens a call] [preset ...]
#include <algorithm>
#include <bit>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "commvq/core/error.hpp"
#include "commvq/core/float16.hpp"
#include "commvq/cuda/append.hpp"
#include "commvq/io/codebook_file.hpp"
#include "commvq/key_codec/key_codec.hpp"
#include "commvq/value_codec/value_codec.hpp"

#include <cuda_runtime_api.h>

namespace {

using namespace commvq;

constexpr int kHeads = 8;
constexpr int kHeadDim = 128;
constexpr int kChannels = kHeads * kHeadDim;
constexpr int kSets = 4;  // of buffers that take turns
constexpr int kWarmUp = 8;
constexpr int kRuns = 40;

void check(cudaError_t error) {
  require(error == cudaSuccess, cudaGetErrorString(error));
}

std::vector<float> normal(std::mt19937& rng, Index count, double deviation) {
  std::normal_distribution<float> distribution(0.0f, static_cast<float>(deviation));
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = distribution(rng);
  return values;
}

/// What is timed.
struct Case {
  const char* name;
  KeyCodecConfig keys;
  ValueCodecConfig values;
};

std::vector<Case> cases() {
  const PairLayout pairs{kHeadDim, kHeadDim, RopeLayout::kHalfSplit};
  const auto with_beam = [](KeyCodecConfig config) {
    config.beam_width = 8;
    return config;
  };
  const KeyCodecConfig one = KeyCodecConfig::paper_1bit(pairs);
  const KeyCodecConfig two = KeyCodecConfig::paper_2bit(pairs);
  return {{"paper_1bit", one, ValueCodecConfig::paper_1bit(kChannels)},
          {"paper_1bit_beam8", with_beam(one), ValueCodecConfig::paper_1bit(kChannels)},
          {"paper_2bit", two, ValueCodecConfig::paper_2bit(kChannels)},
          {"paper_2bit_beam8", with_beam(two), ValueCodecConfig::paper_2bit(kChannels)},
          {"commvq_1bit", with_beam(KeyCodecConfig::commvq_1bit(pairs)),
           ValueCodecConfig::commvq_1bit(kChannels)},
          {"commvq_2bit", with_beam(KeyCodecConfig::commvq_2bit(pairs)),
           ValueCodecConfig::commvq_2bit(kChannels)},
          {"speed_1bit", KeyCodecConfig::speed_1bit(pairs),
           ValueCodecConfig::speed_1bit(kChannels, kHeads)},
          {"speed_2bit", KeyCodecConfig::speed_2bit(pairs),
           ValueCodecConfig::speed_2bit(kChannels, kHeads)}};
}

/// A codec that fits values of independent channels, as a trained one would, so that the polish has
/// little left to do: the bits of a pair add or take off a direction of an orthogonal basis (rows
/// of a Hadamard matrix with random signs of the channels), and the network takes the nearest of
/// three levels, with t = <direction, v> from hidden outputs GELU(t) - GELU(-t).
void set_codec(std::mt19937& rng, const ValueCodecConfig& config, ValueCodecWeights& weights) {
  const int C = config.block().num_channels, H = config.hidden_size;
  const int groups = config.block().num_groups();
  require((C & (C - 1)) == 0 && H >= 2 * groups && groups <= C, "no basis of ", groups,
          " directions of ", C, " channels, or no network of ", 2 * groups, " hidden outputs");
  weights.hidden_weight.assign(static_cast<std::size_t>(Index{config.num_blocks} * H * C), 0.0f);
  weights.output_weight.assign(static_cast<std::size_t>(Index{config.num_logits()} * H), 0.0f);
  weights.output_bias.assign(static_cast<std::size_t>(config.num_logits()), 0.0f);
  weights.decoder.assign(static_cast<std::size_t>(Index{config.num_code_bits()} * C), 0.0f);
  const auto set = [](std::vector<float>& matrix, Index row, Index columns, Index column,
                      float value) {
    matrix[static_cast<std::size_t>(row * columns + column)] = value;
  };
  const float length = 1 / std::sqrt(static_cast<float>(C));
  for (int block = 0; block < config.num_blocks; ++block)
    for (int group = 0; group < groups; ++group) {
      const Index pair = Index{block} * groups + group;
      for (int c = 0; c < C; ++c) {
        const auto sign_of_channel = std::minstd_rand(static_cast<unsigned>(c + 1))() >> 8;
        const bool minus =
            ((std::popcount(static_cast<unsigned>(group & c)) + static_cast<int>(sign_of_channel)) &
             1) != 0;
        const float number = minus ? -length : length;
        for (int sign = 0; sign < 2; ++sign) {
          const float signed_number = sign == 0 ? number : -number;
          set(weights.hidden_weight, Index{block} * H + 2 * group + sign, C, c, signed_number);
          set(weights.decoder, 2 * pair + sign, C, c, signed_number);
        }
      }
      // Patterns (1,0): t - 0.61; (0,1): -t - 0.61; (1,1) and (0,0): nothing.
      for (int pattern = 0; pattern < 2; ++pattern) {
        const float sign = pattern == 0 ? 1.0f : -1.0f;
        set(weights.output_weight, 4 * pair + pattern, H, 2 * group, sign);
        set(weights.output_weight, 4 * pair + pattern, H, 2 * group + 1, -sign);
        weights.output_bias[static_cast<std::size_t>(4 * pair + pattern)] = -0.61f;
      }
    }
  for (float& number : weights.decoder)
    number *= 1 + std::uniform_real_distribution<float>(-0.05f, 0.05f)(rng);
}

/// The library's own codecs weight errors; random weights take the same time.
LayerCodec random_codec(std::mt19937& rng, const Case& timed) {
  const KeyCodecConfig& config = timed.keys;
  std::vector<KeyCodebook<float>> heads;
  for (int head = 0; head < kHeads; ++head) {
    KeyCodebook<float>& codebook = heads.emplace_back(config);
    // Half of a key's length, of the channels that share its norm.
    double size = 0.5 / std::sqrt(static_cast<double>(config.norm_per_head ? kHeadDim : kChannels));
    const double shrink = std::pow(0.17, 1.0 / config.num_stages);
    for (int stage = 0; stage < config.num_stages; ++stage, size *= shrink) {
      for (int which = 0; which < 2; ++which) {
        const auto rows = normal(rng, Index{config.codebook_size} * codebook.row_size(), size);
        std::copy(rows.begin(), rows.end(), codebook.book(0, stage, which));
      }
    }
    if (config.tied)
      codebook.derive_tied_books();
    else
      codebook.pair_weights.assign(kHeadDim / 2, 1.25f);
    if (config.graded) codebook.derive_graded_rows();
  }
  const ValueCodecConfig& values = timed.values;
  const int H = values.hidden_size;
  ValueCodecWeights weights;
  weights.norm_gain.assign(kChannels, 1.0f);
  weights.norm_bias.assign(kChannels, 0.0f);
  weights.hidden_bias.assign(static_cast<std::size_t>(H) * values.num_blocks, 0.0f);
  set_codec(rng, values, weights);
  if (values.graded) weights.derive_graded_rows(values.block().num_channels);
  return {std::make_shared<const KeyCodec>(std::move(heads)),
          std::make_shared<const ValueCodec>(values, std::move(weights))};
}

void* device_copy(const void* data, std::size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes));
  if (data != nullptr)
    check(cudaMemcpy(memory, data, bytes, cudaMemcpyHostToDevice));
  else
    check(cudaMemset(memory, 0, bytes));
  return memory;
}

struct Buffers {
  cuda::AppendParams params[kSets];
  std::vector<void*> owned;

  Buffers(const cuda::DeviceEncoder& encoder, Index num_tokens, std::mt19937& rng) {
    const cuda::DevicePageLayout& layout = encoder.layout();
    const auto own = [&](const void* data, std::size_t bytes) {
      owned.push_back(device_copy(data, bytes));
      return owned.back();
    };
    std::vector<std::int64_t> places(static_cast<std::size_t>(num_tokens));
    for (std::size_t i = 0; i < places.size(); ++i) places[i] = static_cast<std::int64_t>(i);
    for (cuda::AppendParams& p : params) {
      std::vector<std::uint16_t> rows;
      for (const float value : normal(rng, num_tokens * kChannels, 1.0))
        rows.push_back(to_bf16(value));
      p.num_tokens = num_tokens;
      p.keys = own(rows.data(), rows.size() * 2);
      std::reverse(rows.begin(), rows.end());
      p.values = own(rows.data(), rows.size() * 2);
      p.slot_mapping = static_cast<const std::int64_t*>(
          own(places.data(), places.size() * sizeof(std::int64_t)));
      const Index pages = (num_tokens + layout.page_size - 1) / layout.page_size;
      p.pages.data = static_cast<std::uint8_t*>(
          own(nullptr, static_cast<std::size_t>(pages * layout.page_bytes)));
      p.pages.page_stride = layout.page_bytes;
      p.workspace_bytes = cuda::append_workspace_size(encoder, num_tokens);
      p.workspace = own(nullptr, p.workspace_bytes);
      p.exact_mapping = p.slot_mapping;
      p.exact.keys = own(nullptr, rows.size() * 2);
      p.exact.values = own(nullptr, rows.size() * 2);
    }
  }
  Buffers(const Buffers&) = delete;
  ~Buffers() {
    for (void* memory : owned) cudaFree(memory);
  }
};

/// A call as a graph.
cudaGraphExec_t capture(const cuda::DeviceEncoder& encoder, cuda::AppendParams params,
                        cudaStream_t stream) {
  params.stream = stream;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  const cuda::Status status = cuda::append(encoder, params);
  check(cudaStreamEndCapture(stream, &graph));
  require(status.ok(), status.message());
  check(cudaGraphInstantiate(&executable, graph, 0));
  check(cudaGraphDestroy(graph));
  return executable;
}

/// What of a call is timed: codes, or exact copies alone.
struct Part {
  const char* name;
  bool keys, values, copies;
};

/// Median milliseconds.
double milliseconds(const cuda::DeviceEncoder& encoder, const Buffers& buffers, const Part& part) {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream));
  cudaGraphExec_t calls[kSets];
  for (int set = 0; set < kSets; ++set) {
    cuda::AppendParams params = buffers.params[set];
    if (!part.keys) params.keys = nullptr;
    if (!part.values) params.values = nullptr;
    if (part.copies) {
      params.slot_mapping = nullptr;
    } else {
      params.exact = {};
      params.exact_mapping = nullptr;
    }
    calls[set] = capture(encoder, params, stream);
  }
  cudaEvent_t begin = nullptr, end = nullptr;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int run = 0; run < kWarmUp + kRuns; ++run) {
    check(cudaEventRecord(begin, stream));
    check(cudaGraphLaunch(calls[run % kSets], stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float time = 0;
    check(cudaEventElapsedTime(&time, begin, end));
    if (run >= kWarmUp) times.push_back(time);
  }
  for (cudaGraphExec_t call : calls) cudaGraphExecDestroy(call);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaStreamDestroy(stream);
  std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
  return times[kRuns / 2];
}

int run(std::vector<std::string> presets) {
  Index num_tokens = 8192;
  if (!presets.empty() && std::isdigit(static_cast<unsigned char>(presets[0][0])) != 0) {
    num_tokens = std::stoll(presets[0]);
    require(num_tokens >= 1, "tokens a call are ", num_tokens, "; there must be one or more");
    presets.erase(presets.begin());
  }
  const std::vector<Case> all = cases();
  for (const std::string& name : presets)
    require(std::any_of(all.begin(), all.end(), [&](const Case& c) { return name == c.name; }),
            "there is no preset ", name);
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::printf("no GPU here\n");
    return 0;
  }
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, %lld tokens a call\n", device.name, static_cast<long long>(num_tokens));
  std::string json = std::string("{\"device\": \"") + device.name +
                     "\", \"tokens\": " + std::to_string(num_tokens);
  std::mt19937 rng(1);
  for (const Case& timed : all) {
    if (!presets.empty() && std::find(presets.begin(), presets.end(), timed.name) == presets.end())
      continue;
    const LayerCodec codec = random_codec(rng, timed);
    const cuda::DevicePageLayout layout(codec.keys->config(), kHeads, codec.values->config(), 64,
                                        cuda::key_plane_bytes(device.major * 10 + device.minor));
    const cuda::DeviceEncoder encoder = cuda::prepare_encoder(codec, layout);
    const Buffers buffers(encoder, num_tokens, rng);
    for (const Part& part : {Part{"keys", true, false, false}, Part{"values", false, true, false},
                             Part{"both", true, true, false}, Part{"copies", true, true, true}}) {
      const double time = milliseconds(encoder, buffers, part) * 1e3;
      const double rate = static_cast<double>(num_tokens) / time;
      std::printf("%-17s %-6s  %9.1f microseconds  %7.2f million tokens/s\n", timed.name, part.name,
                  time, rate);
      char entry[96];
      std::snprintf(entry, sizeof entry, ", \"%s_%s_mtokens_s\": %.3f", timed.name, part.name,
                    rate);
      json += entry;
    }
  }
  std::printf("%s}\n", json.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "append_cuda_bench: %s\n", error.what());
    return 1;
  }
}
