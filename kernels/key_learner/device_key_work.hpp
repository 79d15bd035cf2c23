#pragma once

#include <cstdint>
#include <vector>

#include "learner/key_sample.hpp"
#include "learner/key_work.hpp"

#include "common/blas.hpp"
#include "common/device_array.hpp"
#include "kernels.hpp"

namespace commvq::cuda {

/// The key learner's work on the current device: keys, codes and residuals stay there; books go to
/// it and statistics come back.
class DeviceKeyWork final : public KeyWork {
 public:
  /// Copies the keys. Throws `Error` for a codec that the kernels do not take, and for lack of
  /// memory.
  DeviceKeyWork(const KeySample& keys, const KeyCodecConfig& config);

  Index size() const override { return num_keys_; }
  void begin_stage(const KeyCodebook<float>& codebook, int group, int stage) override;
  Matrix residuals(const std::vector<Index>& keys) override;
  key_em::Statistics soft_assign(const Matrix& books, double temperature) override;
  void assign(const Matrix& books) override;
  double encode(const KeyCodebook<float>& codebook, int beam_width, bool keep) override;
  double error(const KeyCodebook<float>& codebook) override;
  Occurrences occurrences(int group) override;

 private:
  /// Memory of `soft_assign`, `assign` and of the stage's residuals.
  struct StageMemory {
    DeviceArray<float> residuals, squared_norms, products, terms, best_scores, least_errors, log2_totals;
    DeviceArray<float> chunk_weights, sums;
    DeviceArray<double> chunk_errors, pair_weights;
  };
  /// Memory of the beam search over a batch of keys.
  struct BeamMemory {
    DeviceArray<float> residuals[2], errors[2], products;
    DeviceArray<std::uint32_t> choices;
  };

  cudaStream_t stream() const { return blas_.stream(); }
  void check_kernels(const char* what) const;
  /// The head's books as they were uploaded last.
  key_learner::HeadBooks head_books() const;
  key_learner::HeadBooks upload(const KeyCodebook<float>& codebook);
  key_learner::StageBooks upload_stage(const float* rows, Index width);
  void multiply_by_books(const float* residuals, Index count, const key_learner::StageBooks& books,
                         float* products) const;
  void search(const KeyCodebook<float>& codebook, int beam_width, Index first, Index count,
              BeamMemory& memory);
  void search_group(const KeyCodebook<float>& codebook, int group, int beam_width, Index first,
                    Index count, BeamMemory& memory);

  KeyCodecConfig config_;
  Index num_keys_;
  Blas blas_;
  DeviceArray<float> keys_;  // [keys][head_dim]
  DeviceArray<std::uint16_t> codes_, new_codes_;
  DeviceArray<double> errors_, new_errors_;
  DeviceArray<float> head_rows_, stage_books_;
  StageMemory stage_;
  Index first_code_ = 0;  // of the stage, within a key's codes
};

}  // namespace commvq::cuda
