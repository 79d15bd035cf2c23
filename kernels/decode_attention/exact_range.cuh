#pragma once

#include "decode_attention/problem.cuh"

namespace commvq::cuda {

/// The exact tokens that a query reads, sinks and then the window, numbered from 0.
struct ExactRange {
  int first_sink;
  int num_sinks;
  int first_other;
  int count;

  __device__ ExactRange(const Problem& p, const Sequence& sequence, int position) {
    const int oldest = Sequence::oldest(p, position);
    const int sinks_end = min(p.exact.sinks, position + 1);
    first_sink = min(oldest, sinks_end);
    num_sinks = sinks_end - first_sink;
    first_other = max(max(oldest, sequence.exact_begin(p, position)), sinks_end);
    count = num_sinks + max(0, position + 1 - first_other);
  }
  __device__ int token(int i) const {
    return i < num_sinks ? first_sink + i : first_other + i - num_sinks;
  }
};

}  // namespace commvq::cuda
