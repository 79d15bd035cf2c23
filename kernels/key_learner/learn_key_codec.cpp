#include <algorithm>
#include <future>
#include <mutex>
#include <random>
#include <utility>

#include "commvq/cuda/learner.hpp"

#include <omp.h>

#include "key_learner/device_key_work.hpp"
#include "learner/key_learning.hpp"
#include "learner/key_sample.hpp"

namespace commvq::cuda {
namespace {

/// Heads that are learnt at once: while the host solves for the books of one, the device works on
/// another.
constexpr int kHeadsAtOnce = 8;

/// Reports of heads that are learnt side by side, one at a time and with one falling-free fraction.
class SharedProgress {
 public:
  SharedProgress(const ProgressCallback& callback, int num_heads)
      : callback_(callback), fractions_(static_cast<std::size_t>(num_heads), 0.0) {}

  ProgressCallback of_head(int head) {
    if (!callback_) return {};
    return [this, head](Progress step) {
      const std::lock_guard lock(mutex_);
      fractions_[static_cast<std::size_t>(head)] = step.fraction;
      double sum = 0;
      for (const double fraction : fractions_) sum += fraction;
      step.fraction = sum / static_cast<double>(fractions_.size());
      step.phase += ", head " + std::to_string(head + 1) + "/" + std::to_string(fractions_.size());
      callback_(step);
    };
  }

 private:
  const ProgressCallback& callback_;
  std::mutex mutex_;
  std::vector<double> fractions_;
};

KeyCodebook<float> learn_head(MatrixView<const float> keys, int head,
                              const KeyLearnerOptions& options, int device,
                              KeyLearnerReport* report) {
  omp_set_num_threads(1);  // of this thread: the heads share the processor among them
  check(cudaSetDevice(device), "choosing the device");
  std::mt19937_64 random(options.seed);
  const KeySample sample(keys, head, options, random);
  DeviceKeyWork work(sample, options.codec);
  return key_learning::learn(work, options, random, report);
}

}  // namespace

KeyCodec learn_key_codec(MatrixView<const float> keys, const KeyLearnerOptions& options,
                         std::vector<KeyLearnerReport>* reports) {
  const int num_heads = key_learning::check_layer(keys, options);
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  if (reports != nullptr) reports->assign(static_cast<std::size_t>(num_heads), {});
  SharedProgress progress(options.progress, num_heads);
  std::vector<KeyCodebook<float>> codebooks(static_cast<std::size_t>(num_heads));
  for (int first = 0; first < num_heads; first += kHeadsAtOnce) {
    std::vector<std::future<void>> heads;
    for (int head = first; head < std::min(num_heads, first + kHeadsAtOnce); ++head)
      heads.push_back(std::async(std::launch::async, [&, head] {
        const KeyLearnerOptions of_head =
            key_learning::options_of_head(options, head, progress.of_head(head));
        const auto at = static_cast<std::size_t>(head);
        codebooks[at] = learn_head(keys, head, of_head, device,
                                   reports != nullptr ? &(*reports)[at] : nullptr);
      }));
    for (std::future<void>& head : heads) head.wait();
    for (std::future<void>& head : heads) head.get();  // throws what the head threw
  }
  return KeyCodec(std::move(codebooks));
}

}  // namespace commvq::cuda
