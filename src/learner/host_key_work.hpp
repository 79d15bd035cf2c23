#pragma once

#include <cstdint>
#include <vector>

#include "learner/key_sample.hpp"
#include "learner/key_work.hpp"

namespace commvq {

/// On the host, in batches: residuals are made anew from keys and codes at each reading, since they
/// take much more memory than codes.
class HostKeyWork final : public KeyWork {
 public:
  /// `keys` must outlive the work. `batch_tokens` of them are in memory at once.
  HostKeyWork(const KeySample& keys, const KeyCodecConfig& config, Index batch_tokens);

  Index size() const override { return keys_.size(); }
  void begin_stage(const KeyCodebook<float>& codebook, int group, int stage) override;
  Matrix residuals(const std::vector<Index>& keys) override;
  key_em::Statistics soft_assign(const Matrix& books, double temperature) override;
  void assign(const Matrix& books) override;
  double encode(const KeyCodebook<float>& codebook, int beam_width, bool keep) override;
  double error(const KeyCodebook<float>& codebook) override;
  Occurrences occurrences(int group) override;

 private:
  template <class Use>
  void for_each_batch(Use use) const;
  std::uint16_t* codes_at(Index key) { return codes_.data() + key * config_.num_codes(); }
  void add_occurrences(MatrixView<const float> keys, const std::uint16_t* codes, int group,
                       Occurrences& sum) const;

  const KeySample& keys_;
  KeyCodecConfig config_;
  Index batch_tokens_;
  std::vector<std::uint16_t> codes_;  // [keys][num_codes]
  key_em::Residuals residuals_;
  Index first_code_ = 0;  // of the stage, within a key's codes
};

}  // namespace commvq
