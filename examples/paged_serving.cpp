// Serves requests that begin with the same instructions from a pool of pages too small for all of
// them: what prefix sharing, eviction and swapping do, without a model.
#include <cstdio>
#include <cstring>
#include <random>

#include "commvq/cuda/page_layout.hpp"
#include "commvq/value_codec/value_codec.hpp"

#include <CLI/CLI.hpp>

#include "engine/console.hpp"
#include "paged_allocator/sequences.hpp"

namespace {

using paged::Index;

struct Options {
  int requests = 24;      ///< one after the other, four at a time
  int instructions = 96;  ///< tokens that all requests begin with
  int question = 40;      ///< tokens of their own
  int answer = 60;
  int chunk = 64;  ///< tokens of a prefill step
  int blocks = 24;
};

struct Request {
  paged::Sequences::Id id;
  std::vector<int> prompt;
  int written = 0;  ///< of the answer
};

struct Counts {
  Index prefilled = 0, reused = 0, swaps = 0, steps = 0;
};

/// Writes the next tokens of a sequence: codes that the engine's encoder would make, here of the
/// tokens' numbers. False if there is no room.
bool write(paged::Sequences& sequences, Request& request, std::span<const int> tokens,
           const commvq::cuda::DevicePageLayout& layout, std::vector<std::uint8_t>& pages) {
  const auto count = static_cast<Index>(tokens.size());
  if (!sequences.reserve(request.id, count)) return false;
  const std::vector<std::int64_t> slots = sequences.slots(request.id, count);
  std::vector<std::uint16_t> codes(
      static_cast<std::size_t>(layout.num_kv_heads * layout.num_groups * layout.num_books));
  std::vector<std::uint16_t> norms(static_cast<std::size_t>(layout.norms_per_token));
  std::vector<std::uint8_t> value(static_cast<std::size_t>(layout.num_code_bits / 8));
  const std::vector<std::uint16_t> scales(static_cast<std::size_t>(layout.value_blocks));
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    codes.assign(codes.size(), static_cast<std::uint16_t>(tokens[t] % layout.codebook_size));
    const Index block = slots[t] / layout.page_size;
    commvq::cuda::put_token(layout, pages.data() + block * layout.page_bytes,
                            static_cast<int>(slots[t] % layout.page_size), codes.data(),
                            norms.data(), value.data(), scales.data());
  }
  sequences.commit(request.id, tokens);
  return true;
}

/// One step of a request: a chunk of its prompt, or a token of its answer. False if there is no
/// room.
bool step(paged::Sequences& sequences, Request& request, const Options& options,
          const commvq::cuda::DevicePageLayout& layout, std::vector<std::uint8_t>& pages,
          Counts& counts) {
  const Index length = sequences.length(request.id);
  const auto prompt = static_cast<Index>(request.prompt.size());
  if (length < prompt) {
    const Index count = std::min<Index>(options.chunk, prompt - length);
    const auto part =
        std::span<const int>(request.prompt)
            .subspan(static_cast<std::size_t>(length), static_cast<std::size_t>(count));
    if (!write(sequences, request, part, layout, pages)) return false;
    counts.prefilled += count;
    return true;
  }
  const int token = request.written;
  if (!write(sequences, request, {&token, 1}, layout, pages)) return false;
  ++request.written;
  return true;
}

/// Swaps out the youngest request in memory. Throws if that is the only one.
void make_room(paged::Sequences& sequences, std::vector<Request>& running, Counts& counts) {
  std::vector<Request*> in_memory;
  for (Request& request : running)
    if (!sequences.is_swapped_out(request.id)) in_memory.push_back(&request);
  commvq::require(in_memory.size() > 1, "a request alone needs more than ",
                  sequences.pool().num_blocks(), " blocks; give --blocks");
  sequences.swap_out(in_memory.back()->id);
  ++counts.swaps;
}

/// Runs every request to its end, up to four side by side.
Counts serve(paged::Sequences& sequences, const Options& options,
             const commvq::cuda::DevicePageLayout& layout, std::vector<std::uint8_t>& pages) {
  std::mt19937 random(1);
  std::vector<Request> running;
  Counts counts;
  int started = 0;
  while (started < options.requests || !running.empty()) {
    while (running.size() < 4 && started < options.requests) {
      Request request{0, std::vector<int>(static_cast<std::size_t>(options.instructions)), 0};
      for (int i = 0; i < options.instructions; ++i)
        request.prompt[static_cast<std::size_t>(i)] = i;
      for (int i = 0; i < options.question; ++i)
        request.prompt.push_back(static_cast<int>(random() % 100000));
      request.id = sequences.add(request.prompt);
      counts.reused += sequences.length(request.id);
      running.push_back(std::move(request));
      ++started;
    }
    for (Request& request : running) {
      if (sequences.is_swapped_out(request.id) && !sequences.swap_in(request.id)) continue;
      if (step(sequences, request, options, layout, pages, counts)) {
        ++counts.steps;
      } else {
        make_room(sequences, running, counts);
      }
    }
    std::erase_if(running, [&](const Request& request) {
      if (request.written < options.answer) return false;
      sequences.remove(request.id);
      return true;
    });
  }
  return counts;
}

int run(const Options& options) {
  commvq::KeyCodecConfig keys = commvq::KeyCodecConfig::commvq_1bit(commvq::PairLayout{});
  const auto values = commvq::ValueCodecConfig::commvq_1bit(8 * 128);
  const commvq::cuda::DevicePageLayout layout(keys, 8, values, 16,
                                              commvq::cuda::key_plane_bytes(90));
  std::vector<std::uint8_t> pages(static_cast<std::size_t>(options.blocks) *
                                  static_cast<std::size_t>(layout.page_bytes));
  paged::Sequences sequences(options.blocks, layout.page_size,
                             {{pages.data(), layout.page_bytes, layout.page_bytes}},
                             [](void* to, const void* from, Index bytes) {
                               std::memcpy(to, from, static_cast<std::size_t>(bytes));
                             });
  const Counts counts = serve(sequences, options, layout, pages);
  std::printf("%d requests of %d tokens in %d blocks of %d: %lld bytes a block and layer\n",
              options.requests, options.instructions + options.question + options.answer,
              options.blocks, layout.page_size, static_cast<long long>(sequences.block_bytes()));
  std::printf("%lld prompt tokens coded, %lld found in blocks of earlier requests\n",
              static_cast<long long>(counts.prefilled), static_cast<long long>(counts.reused));
  std::printf("%lld steps, %lld swaps to host memory, %lld blocks evicted\n",
              static_cast<long long>(counts.steps), static_cast<long long>(counts.swaps),
              static_cast<long long>(sequences.pool().num_evictions()));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("Serves requests with common instructions from few pages, without a model.");
  const auto add = [&](const char* name, int& value, const char* text) {
    app.add_option(name, value, text)->check(CLI::Range(1, 100000))->capture_default_str();
  };
  add("--requests", options.requests, "Requests, four at a time");
  add("--instructions", options.instructions, "Tokens that all requests begin with");
  add("--question", options.question, "Tokens of their own");
  add("--answer", options.answer, "Tokens to write");
  add("--chunk", options.chunk, "Most prompt tokens of a step");
  add("--blocks", options.blocks, "Blocks of 16 tokens");
  CLI11_PARSE(app, argc, argv);
  return engine::run_program([&] { return run(options); });
}
