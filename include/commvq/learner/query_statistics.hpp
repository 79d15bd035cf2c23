#pragma once

#include <vector>

#include "commvq/core/export.h"
#include "commvq/core/view.hpp"
#include "commvq/rope/pair_layout.hpp"

namespace commvq {

/// How long the queries of a layer are in each RoPE pair, for weighting the error of keys.
///
/// Read as complex numbers (see `PairLayout`), an error e_i of key pair i changes a query's logit
/// by Re(conj(q_i) e^{j phi} e_i), where the angle phi depends on the distance of query and key.
/// Averaged over angles its square is E|q_i|^2 |e_i|^2 / 2: weighting pair i with
/// w_i = sqrt(E|q_i|^2) makes the encoder minimise the error of the logits. A rotation does not
/// change |q_i|, so queries before and after RoPE give the same weights.
class COMMVQ_API QueryStatistics {
 public:
  /// Throws `Error` for an invalid layout or no heads.
  QueryStatistics(const PairLayout& pairs, int num_kv_heads);

  /// Adds queries `[tokens][num_q_heads * head_dim]`, channel order; num_q_heads is a multiple of
  /// num_kv_heads, and query head h reads KV head h / (num_q_heads / num_kv_heads). Throws `Error`
  /// for shapes that do not fit and for NaN and infinity; nothing is then added.
  void add(MatrixView<const float> queries);

  /// Adds what another one has added up. Throws `Error` if its layout or number of heads differs.
  void add(const QueryStatistics& other);

  /// `[num_kv_heads][num_pairs]`: sqrt of the mean of |q_i|^2 over tokens and query heads of a KV
  /// head, divided by its root mean square over the head's pairs and at least kMinWeight, so that
  /// no pair is given up. All ones for a head whose queries are zero or none.
  std::vector<float> pair_weights() const;

  static constexpr float kMinWeight = 0.01f;

 private:
  PairLayout pairs_;
  int num_kv_heads_;
  std::vector<double> sums_;  // [num_kv_heads][num_pairs]: of |q_i|^2
};

}  // namespace commvq
