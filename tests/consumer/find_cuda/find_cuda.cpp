// A program of the CUDA backend that needs no device: a call without pages is refused before
// anything is enqueued.
#include <cstdio>

#include "commvq/cuda/decode_attention.hpp"
#include "commvq/cuda/device_codebooks.hpp"

int main() {
  const commvq::cuda::DeviceCodebooks codebooks;
  const commvq::cuda::Status status = commvq::cuda::decode_attention(codebooks, {});
  std::printf("%s\n", status.message());
  return status.code() == commvq::cuda::StatusCode::kInvalidArgument ? 0 : 1;
}
