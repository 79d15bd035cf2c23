#!/usr/bin/env bash
# Builds the fuzzing harnesses and runs each for so many seconds: scripts/fuzz.sh [SECONDS] [CORES].
# build-fuzz/bundle then holds all that another x86-64 machine needs; its run.sh takes the same
# arguments.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/install_packages.sh clang libclang-rt-14-dev libomp-dev libdlpack-dev
cmake --preset fuzz >/dev/null
cmake --build --preset fuzz --target fuzz_bundle --parallel "$(nproc)"
build-fuzz/bundle/run.sh "$@"
