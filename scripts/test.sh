#!/usr/bin/env bash
# What CI runs: installs what is missing, then the stages named, all by default. Works on a bare
# Debian 12.
#   suite        builds everything, warnings being errors, and runs all tests
#   sanitizers   scripts/test_sanitizers.sh and scripts/coverage.sh
#   lint         scripts/lint.sh src
set -euo pipefail
cd "$(dirname "$0")/.."

stages=${*:-suite sanitizers lint}
has() { [[ " $stages " == *" $1 "* ]]; }

if has suite; then
  scripts/install_packages.sh doxygen dpkg-dev file libdlpack-dev python3-numpy
  # To be soon done: kernels for two architectures of five, the oldest and the one with code of its
  # own; headers of others compiled once (the lint stage compiles without).
  cmake --preset release -DCOMMVQ_BUILD_TESTS=ON -DCOMMVQ_BUILD_BENCH=ON \
    -DCOMMVQ_BUILD_EXAMPLES=ON -DCOMMVQ_WARNINGS_AS_ERRORS=ON \
    -DCMAKE_CUDA_ARCHITECTURES="80-real;90a-real" -DCOMMVQ_PRECOMPILE_HEADERS=ON
  cmake --build --preset release
  export OMP_WAIT_POLICY=passive  # tests run side by side: idle threads must not keep cores busy
  ctest --preset release --parallel "$(nproc)"
fi
if has sanitizers; then
  scripts/test_sanitizers.sh
  scripts/coverage.sh
fi
if has lint; then scripts/lint.sh src; fi
