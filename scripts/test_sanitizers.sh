#!/usr/bin/env bash
# The tests of the host part under sanitizers, with Clang, and the fuzzing harnesses for a short
# time. Stages: address (with undefined behaviour; builds the harnesses too), thread, fuzz; all by
# default.
set -euo pipefail
cd "$(dirname "$0")/.."

stages=${*:-address thread fuzz}
fuzz_seconds=${COMMVQ_FUZZ_SECONDS:-5}
jobs=$(nproc)  # before OMP_NUM_THREADS is set, which it heeds
has() { [[ " $stages " == *" $1 "* ]]; }

scripts/install_packages.sh clang libclang-rt-14-dev libomp-dev llvm libdlpack-dev \
  python3-numpy
export OMP_WAIT_POLICY=passive

run_tests() {
  cmake --preset "$1" >/dev/null
  cmake --build --preset "$1" --parallel "$jobs"
  ctest --preset "$1" --parallel "$jobs"
}

if has address; then
  export ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1
  # Threads are for the next stage: here tests run side by side.
  export OMP_NUM_THREADS=1
  export LSAN_OPTIONS="suppressions=$PWD/cmake/leak_suppressions.txt print_suppressions=0"
  rm -rf build-asan/profiles  # which lines ran, for scripts/coverage.sh
  LLVM_PROFILE_FILE=$PWD/build-asan/profiles/%4m.profraw run_tests asan
fi
if has thread; then
  # LLVM's OpenMP tells the sanitizer, through its tool Archer, when threads wait for each other;
  # GCC's would leave every barrier unseen and be full of reports. The library itself is not
  # instrumented and must be ignored.
  export TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1" OMP_NUM_THREADS=2
  run_tests tsan
fi
if has fuzz; then LLVM_PROFILE_FILE=/dev/null build-asan/bundle/run.sh "$fuzz_seconds" "$jobs"; fi
