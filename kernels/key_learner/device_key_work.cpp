#include "key_learner/device_key_work.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

namespace commvq::cuda {
namespace {

using key_learner::HeadBooks;
using key_learner::StageBooks;

/// Keys whose candidates are on the device at once, times the width of the beam.
constexpr Index kBeamRows = 1 << 17;

double mean_of(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

void check_config(const KeyCodecConfig& config) {
  require(config.codebook_size <= key_learner::kMaxCodebookSize, "codebook_size is ",
          config.codebook_size, "; the device's learner takes at most ",
          key_learner::kMaxCodebookSize, ": learn on the host");
  require(config.num_stages <= 256, "num_stages is ", config.num_stages,
          "; the device's learner takes at most 256: learn on the host");
}

}  // namespace

DeviceKeyWork::DeviceKeyWork(const KeySample& keys, const KeyCodecConfig& config)
    : config_(config), num_keys_(keys.size()) {
  check_config(config);
  const int head_dim = config.pairs.head_dim;
  const Index width = Index{2} * config.group_pairs, books = Index{2} * config.codebook_size;
  const Index chunks = key_learner::num_chunks(num_keys_);
  std::vector<float> planar(static_cast<std::size_t>(num_keys_ * head_dim));
  keys.read(0, num_keys_, 0, config.pairs.num_pairs(), planar.data());
  keys_ = DeviceArray<float>(num_keys_ * head_dim);
  keys_.upload(planar.data(), num_keys_ * head_dim, stream());
  codes_ = DeviceArray<std::uint16_t>(num_keys_ * config.num_codes());
  codes_.clear(stream());
  new_codes_ = DeviceArray<std::uint16_t>(num_keys_ * config.num_codes());
  errors_ = DeviceArray<double>(num_keys_);
  new_errors_ = DeviceArray<double>(num_keys_);
  head_rows_ = DeviceArray<float>(config.num_groups() * config.num_stages * books * width);
  stage_books_ = DeviceArray<float>(books * width + books + books * config.codebook_size);
  const Index pairs = Index{config.codebook_size} * config.codebook_size;
  stage_.residuals = DeviceArray<float>(num_keys_ * width);
  stage_.squared_norms = DeviceArray<float>(num_keys_);
  stage_.products = DeviceArray<float>(num_keys_ * books);
  stage_.terms = DeviceArray<float>(num_keys_ * books);
  stage_.best_scores = DeviceArray<float>(num_keys_);
  stage_.least_errors = DeviceArray<float>(num_keys_);
  stage_.log2_totals = DeviceArray<float>(num_keys_);
  stage_.chunk_weights = DeviceArray<float>(chunks * pairs);
  stage_.sums = DeviceArray<float>(books * width);
  stage_.chunk_errors = DeviceArray<double>(chunks);
  stage_.pair_weights = DeviceArray<double>(pairs);
}

void DeviceKeyWork::check_kernels(const char* what) const {
  check(cudaGetLastError(), what);
  check(cudaStreamSynchronize(stream()), what);
}

HeadBooks DeviceKeyWork::head_books() const {
  return {config_.num_groups(), config_.num_stages, config_.codebook_size,
          2 * config_.group_pairs, head_rows_.data()};
}

HeadBooks DeviceKeyWork::upload(const KeyCodebook<float>& codebook) {
  head_rows_.upload(codebook.rows.data(), static_cast<Index>(codebook.rows.size()), stream());
  return head_books();
}

/// Rows, their squared norms and cross terms, one after the other.
StageBooks DeviceKeyWork::upload_stage(const float* rows, Index width) {
  const Index size = config_.codebook_size;
  const Eigen::Map<const Matrix> books(rows, 2 * size, width);
  Eigen::VectorXf image(stage_books_.size());
  Eigen::Map<Matrix>(image.data(), 2 * size, width) = books;
  float* const norms = image.data() + 2 * size * width;
  Eigen::Map<Eigen::VectorXf>(norms, 2 * size) = books.rowwise().squaredNorm();
  float* const cross = norms + 2 * size;
  const Matrix by_a = 2.0f * books.topRows(size) * books.bottomRows(size).transpose();
  Eigen::Map<Matrix>(cross, size, size) = by_a;
  Eigen::Map<Matrix>(cross + size * size, size, size) = by_a.transpose();
  stage_books_.upload(image.data(), image.size(), stream());
  const float* const at = stage_books_.data();
  return {static_cast<int>(size), static_cast<int>(width), at, at + 2 * size * width,
          at + 2 * size * width + 2 * size};
}

void DeviceKeyWork::multiply_by_books(const float* residuals, Index count, const StageBooks& books,
                                      float* products) const {
  blas_.multiply(Blas::Form::kAsIs, Blas::Form::kTransposed, count,
                 Index{2} * books.codebook_size, books.width, 1.0f, residuals, books.rows, 0.0f,
                 products);
}

void DeviceKeyWork::begin_stage(const KeyCodebook<float>& codebook, int group, int stage) {
  first_code_ = Index{2} * (Index{group} * config_.num_stages + stage);
  key_learner::make_residuals(upload(codebook), group, stage, num_keys_, keys_.data(),
                              codes_.data(), stage_.residuals.data(), stage_.squared_norms.data(),
                              stream());
  check_kernels("making residuals");
}

KeyWork::Matrix DeviceKeyWork::residuals(const std::vector<Index>& keys) {
  const Index width = Index{2} * config_.group_pairs;
  Matrix result(static_cast<Index>(keys.size()), width);
  for (Index i = 0; i < result.rows(); ++i)
    check(cudaMemcpyAsync(result.row(i).data(),
                          stage_.residuals.data() + keys[static_cast<std::size_t>(i)] * width,
                          static_cast<std::size_t>(width) * sizeof(float), cudaMemcpyDeviceToHost,
                          stream()),
          "copying residuals");
  check_kernels("copying residuals");
  return result;
}

key_em::Statistics DeviceKeyWork::soft_assign(const Matrix& books, double temperature) {
  const StageBooks stage = upload_stage(books.data(), books.cols());
  multiply_by_books(stage_.residuals.data(), num_keys_, stage, stage_.products.data());
  key_learner::soft_assign(
      stage,
      {num_keys_, static_cast<float>(1 / temperature), stage_.products.data(), stage_.terms.data(),
       stage_.best_scores.data(), stage_.least_errors.data(), stage_.log2_totals.data(), stage_.squared_norms.data(),
       stage_.chunk_weights.data(), stage_.chunk_errors.data(), stage_.pair_weights.data()},
      stream());
  blas_.multiply(Blas::Form::kTransposed, Blas::Form::kAsIs, books.rows(), books.cols(), num_keys_,
                 1.0f, stage_.products.data(), stage_.residuals.data(), 0.0f, stage_.sums.data());
  check_kernels("assigning residuals to centres");

  key_em::Statistics result;
  for (const double error : stage_.chunk_errors.download(stream())) result.squared_error += error;
  Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> weights(
      config_.codebook_size, config_.codebook_size);
  stage_.pair_weights.download(weights.data(), weights.size(), stream());
  result.pair_weights = weights;
  Matrix sums(books.rows(), books.cols());
  stage_.sums.download(sums.data(), sums.size(), stream());
  result.sums = sums.cast<double>();
  return result;
}

void DeviceKeyWork::assign(const Matrix& books) {
  const StageBooks stage = upload_stage(books.data(), books.cols());
  multiply_by_books(stage_.residuals.data(), num_keys_, stage, stage_.products.data());
  key_learner::assign_nearest(stage, num_keys_, stage_.products.data(),
                              codes_.data() + first_code_, config_.num_codes(), stream());
  check_kernels("finding nearest centres");
}

double DeviceKeyWork::encode(const KeyCodebook<float>& codebook, int beam_width, bool keep) {
  require(beam_width <= key_learner::kMaxBeamWidth, "beam_width is ", beam_width,
          "; the device's learner takes at most ", key_learner::kMaxBeamWidth,
          ": learn on the host");
  const Index batch = std::min(num_keys_, kBeamRows / beam_width);
  BeamMemory memory;
  for (int i = 0; i < 2; ++i) {
    memory.residuals[i] = DeviceArray<float>(batch * beam_width * 2 * config_.group_pairs);
    memory.errors[i] = DeviceArray<float>(batch * beam_width);
  }
  memory.products = DeviceArray<float>(batch * beam_width * 2 * config_.codebook_size);
  memory.choices = DeviceArray<std::uint32_t>(batch * beam_width * config_.num_stages);
  for (Index first = 0; first < num_keys_; first += batch)
    search(codebook, beam_width, first, std::min(batch, num_keys_ - first), memory);

  const HeadBooks books = upload(codebook);
  const auto errors_of = [&](DeviceArray<std::uint16_t>& codes, DeviceArray<double>& errors) {
    key_learner::squared_errors(books, num_keys_, keys_.data(), codes.data(), errors.data(),
                                stream());
  };
  errors_of(new_codes_, new_errors_);
  if (keep) {
    errors_of(codes_, errors_);
    key_learner::keep_better(num_keys_, config_.num_codes(), new_codes_.data(), new_errors_.data(),
                             codes_.data(), errors_.data(), stream());
  } else {
    std::swap(codes_, new_codes_);
    std::swap(errors_, new_errors_);
  }
  check_kernels("encoding keys");
  return mean_of(errors_.download(stream()));
}

/// Writes the new codes of keys [first, first + count).
void DeviceKeyWork::search(const KeyCodebook<float>& codebook, int beam_width, Index first,
                           Index count, BeamMemory& memory) {
  for (int group = 0; group < config_.num_groups(); ++group) {
    key_learner::make_residuals(head_books(), group, 0, count,
                                keys_.data() + first * config_.pairs.head_dim, nullptr,
                                memory.residuals[0].data(), memory.errors[0].data(), stream());
    search_group(codebook, group, beam_width, first, count, memory);
  }
}

void DeviceKeyWork::search_group(const KeyCodebook<float>& codebook, int group, int beam_width,
                                 Index first, Index count, BeamMemory& memory) {
  const Index stride = memory.choices.size() / config_.num_stages;
  const Index centres = Index{config_.codebook_size} * config_.codebook_size;
  std::vector<int> widths;
  int width = 1;
  for (int stage = 0; stage < config_.num_stages; ++stage) {
    const int from = stage % 2, to = 1 - from;
    const StageBooks books =
        upload_stage(codebook.book(group, stage, 0), Index{2} * config_.group_pairs);
    multiply_by_books(memory.residuals[from].data(), count * width, books, memory.products.data());
    const int new_width = static_cast<int>(std::min<Index>(beam_width, width * centres));
    const bool fits = key_learner::extend_beam(
        books, {count, width, memory.residuals[from].data(), memory.errors[from].data()},
        memory.products.data(), new_width, memory.choices.data() + stage * stride,
        memory.residuals[to].data(), memory.errors[to].data(), stream());
    require(fits, "a beam of ", width, " over books of ", config_.codebook_size,
            " needs more shared memory than the device has: use a smaller beam or learn on the ",
            "host");
    // The next stage's books take the place of these.
    check_kernels("searching for codes");
    width = new_width;
    widths.push_back(width);
  }
  key_learner::trace_beam(count, config_.num_stages, widths.data(), memory.choices.data(), stride,
                          new_codes_.data() + first * config_.num_codes() +
                              Index{2} * group * config_.num_stages,
                          config_.num_codes(), stream());
}

double DeviceKeyWork::error(const KeyCodebook<float>& codebook) {
  key_learner::squared_errors(upload(codebook), num_keys_, keys_.data(), codes_.data(),
                              errors_.data(), stream());
  check_kernels("decoding keys");
  return mean_of(errors_.download(stream()));
}

Occurrences DeviceKeyWork::occurrences(int group) {
  const Index rows = Index{2} * config_.num_stages * config_.codebook_size;
  const Index width = Index{2} * config_.group_pairs;
  DeviceArray<int> counts(rows * rows);
  DeviceArray<float> chunk_sums(key_learner::kSumChunks * rows * width);
  DeviceArray<double> sums(rows * width);
  const bool fits = key_learner::count_occurrences(head_books(), group, num_keys_, keys_.data(),
                                                   codes_.data(), counts.data(), chunk_sums.data(),
                                                   sums.data(), stream());
  require(fits, "books of ", config_.codebook_size, " x ", width,
          " floats do not fit the device's shared memory: learn on the host");
  check_kernels("counting codes");
  const std::vector<int> all = counts.download(stream());
  const std::vector<double> of_rows = sums.download(stream());
  // The counts are symmetric.
  return {Eigen::Map<const Eigen::MatrixXi>(all.data(), rows, rows).cast<double>(),
          Eigen::Map<const Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>(
              of_rows.data(), rows, width)};
}

}  // namespace commvq::cuda
