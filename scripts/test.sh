#!/usr/bin/env bash
# Installs what is missing, builds everything and runs all tests. Works on a bare Debian 12.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/install_packages.sh doxygen dpkg-dev file libdlpack-dev python3-numpy
cmake --preset release -DCOMMVQ_BUILD_TESTS=ON -DCOMMVQ_BUILD_BENCH=ON -DCOMMVQ_BUILD_EXAMPLES=ON
cmake --build --preset release
export OMP_WAIT_POLICY=passive  # tests run side by side: idle threads must not keep cores busy
ctest --preset release --parallel "$(nproc)"
