#!/usr/bin/env bash
# On a machine with a device and the CUDA toolkit: builds, tests, sanitizes and times the CUDA
# backend, and prints a short table last. Steps: build, test, sanitize, bench; all by default.
# COMMVQ_CUDA_EXAMPLES=OFF leaves out the example engine and its test.
set -euo pipefail
cd "$(dirname "$0")/.."

steps=${*:-build test sanitize bench}
build=${COMMVQ_CUDA_BUILD:-build-cuda}
has() { [[ " $steps " == *" $1 "* ]]; }

if has build; then
  generator=()
  command -v ninja >/dev/null && generator=(-G Ninja)
  cmake -B "$build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DCOMMVQ_ENABLE_CUDA=ON \
    -DCMAKE_CUDA_ARCHITECTURES="${COMMVQ_CUDA_ARCHITECTURES:-90a}" \
    -DCOMMVQ_BUILD_EXAMPLES="${COMMVQ_CUDA_EXAMPLES:-ON}" >/dev/null
  targets=$(cmake --build "$build" --target help | grep -oE '\bcuda_[a-z_]+_test\b|\b[a-z_]+_cuda_bench\b' | sort -u)
  # shellcheck disable=SC2086
  cmake --build "$build" --parallel "$(nproc)" --target $targets
fi
if has test; then
  for test in "$build"/tests/cuda_*_test; do "$test" --gtest_brief=1; done
fi
if has sanitize; then
  for test in "$build"/tests/cuda_*_test; do
    for tool in memcheck racecheck initcheck synccheck; do
      echo "$(basename "$test") under $tool"
      timeout "${COMMVQ_SANITIZE_SECONDS:-3600}" compute-sanitizer --tool "$tool" --error-exitcode 9 "$test" --gtest_brief=1 \
        --gtest_filter="${COMMVQ_SANITIZE_FILTER:-*}" | tail -n 3
    done
  done
fi
if has bench; then
  python3 bench/compare_attention.py "$build/bench/decode_attention_cuda_bench"
fi
