#!/usr/bin/env bash
# Installs what is missing, builds everything and runs all tests. Works on a bare Debian 12.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/install_packages.sh
cmake --preset release
cmake --build --preset release
ctest --preset release --parallel "$(nproc)"
